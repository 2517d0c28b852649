"""From what a server writes for a token to the token's id, where that is possible.

Many servers name the best tokens by their text alone. Text that several ids share, or that is only
a part of a character, names none; such entries are counted and their mass is in the tail.
"""

import codecs
import json
import re
from collections import defaultdict
from collections.abc import Sequence

import transformers

from gkdjax.utils.errors import UserError

_LOSSY = "\N{REPLACEMENT CHARACTER}"  # stands for bytes that are not UTF-8
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_INSIDE = ("ByteLevel", "ByteFallback", "Metaspace", "Replace")  # decoders that change a token
_BETWEEN = ("Fuse", "Strip")  # decoders that join tokens, and strip what is joined

# Byte-level BPE's characters: a visible Latin-1 byte is itself, the others follow from 256 on.
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE}
_BYTE_OF |= {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}


class TokenMap:
    """The bytes of a tokenizer's tokens, and the way back where it is one to one.

    The tokenizer's own decoder says which bytes a token has: byte-level BPE (Qwen, Llama 3), "▁"
    for a space and byte tokens "<0x0A>" (Gemma, Llama 2), or the token as it stands. No tokenizer
    writes a byte token whose byte is a character with a token of its own: there is no way back.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast):
        """Reads the vocabulary; UserError if a decoder of this kind cannot be taken apart."""
        steps = _steps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
        read = {i: _read(token, steps) for token, i in tokenizer.get_vocab().items()}
        self._bytes = {i: raw for i, (raw, _) in read.items()}
        groups: dict[bytes, list[int]] = defaultdict(list)
        for i, (raw, is_byte_token) in sorted(read.items(), key=lambda item: item[1][1]):
            if raw and not (is_byte_token and raw in groups):
                groups[raw].append(i)
        self._ids = {raw: ids[0] for raw, ids in groups.items() if len(ids) == 1}

    def id_of(self, key: bytes | str) -> int | None:
        """The only id with these bytes or this text; None for none, several, and U+FFFD in text."""
        if isinstance(key, bytes):
            return self._ids.get(key)
        # JSON can say half of a surrogate pair.
        return None if _LOSSY in key else self._ids.get(key.encode(errors="surrogatepass"))

    def string(self, i: int) -> str | None:
        """What a token reads as, with U+FFFD for bytes that are not UTF-8; None: no such id."""
        raw = self._bytes.get(i)
        return None if raw is None else raw.decode("utf-8", errors="replace")

    def parts_before(self, ids: Sequence[int | None]) -> list[bool]:
        """Whether a character is begun and not complete where each of these ids follows."""
        found, decoder = [], codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            found.append(bool(decoder.getstate()[0]))
            decoder.decode(self._bytes.get(i) or b"")
        return found

    def is_whole(self, i: int) -> bool:
        """Whether the token's text says which bytes it has."""
        text = self.string(i)
        return text is not None and _LOSSY not in text


def _steps(decoder: dict | None) -> list[dict]:
    """The decoder's parts that look inside a token, in order."""
    if decoder is None or decoder["type"] in _BETWEEN:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps(part)]
    is_regex = decoder["type"] == "Replace" and "String" not in decoder["pattern"]
    if decoder["type"] not in _INSIDE or is_regex:
        raise UserError(
            f"the tokenizer decodes with {json.dumps(decoder)}, and from that the text of a single"
            " token is not known; use a dialect that answers in token ids"
        )
    return [decoder]


def _read(token: str, steps: Sequence[dict]) -> tuple[bytes, bool]:
    """(the token's bytes, whether it is a byte token)."""
    for step in steps:
        kind = step["type"]
        if kind == "Replace":
            token = token.replace(step["pattern"]["String"], step["content"])
        elif kind == "Metaspace":
            token = token.replace(step["replacement"], " ")
        elif kind == "ByteFallback" and (found := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(found[1], 16)]), True
        elif kind == "ByteLevel" and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token), False
    return token.encode(), False
