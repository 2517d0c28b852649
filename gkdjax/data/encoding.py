"""Encodes text piece by piece, and a piece that comes again only once.

A tokenizer cuts text at its added tokens before it does anything else, and encodes what is between
them apart. A chat template writes such tokens around each message, so that both views of a row, its
prompts, and rows with one prefix have most pieces in common.
"""

import functools
import itertools
import re
from collections.abc import Iterable

import numpy as np
import transformers

# Texts that a tokenizer might encode in another way beside others.
_PROBES = ("a", " a b ", "\n\nThe end.\n", "  ", "e\u0301x 12\t", ".", "user\n", "")

Encoded = tuple[np.ndarray, np.ndarray]  # ids int32 [T], (start, end) in characters int64 [T, 2]


class Encoder:
    """Encodes text as it stands: text -> the ids and the characters of its tokens."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, template: str):
        """Cuts text at the added tokens that the chat template writes, if all pieces then fit."""
        self._tokenizer = tokenizer
        # More than a row has, and few enough for long ones.
        self._piece = functools.lru_cache(maxsize=256)(self._apart)
        cuts = _sure_cuts(tokenizer, template)
        self._cut = re.compile("|".join(map(re.escape, cuts)))
        probe = "".join(f"{text}{cut}" for cut in cuts for text in _PROBES)
        if not cuts or not all(map(np.array_equal, self(probe), self._whole(probe))):
            self._cut = None

    def __call__(self, text: str) -> Encoded:
        starts, parts = self._parts(text)
        spans = [at + start for (_, at), start in zip(parts, starts, strict=True)]
        return np.concatenate([ids for ids, _ in parts]), np.concatenate(spans)

    def ids(self, text: str) -> np.ndarray:
        return np.concatenate([ids for ids, _ in self._parts(text)[1]])

    def _parts(self, text: str) -> tuple[list[int], list[Encoded]]:
        """Returns where the pieces begin, and what they are encoded as."""
        if self._cut is None:
            return [0], [self._whole(text)]
        starts = [0, *[match.start() for match in self._cut.finditer(text) if match.start()]]
        ends = (*starts[1:], len(text))
        return starts, [self._piece(text[a:b]) for a, b in zip(starts, ends, strict=True)]

    def _whole(self, text: str) -> Encoded:
        # The template writes the special tokens itself, bos included.
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return _arrays(found["input_ids"], found["offset_mapping"])

    def _apart(self, piece: str) -> Encoded:
        found = self._tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False)
        return _arrays(found.ids, found.offsets)


encoder_of = functools.lru_cache(maxsize=8)(Encoder)  # student and teacher may have one tokenizer


def _arrays(ids: list[int], spans: list[tuple[int, int]]) -> Encoded:
    flat = itertools.chain.from_iterable(spans)  # np.asarray takes twice as long
    at = np.fromiter(flat, np.int64, 2 * len(spans)).reshape(-1, 2)
    return np.asarray(ids, np.int32), at


def _sure_cuts(tokenizer: transformers.PreTrainedTokenizerBase, template: str) -> list[str]:
    """Returns the tokens that a template writes before which text is cut wherever they stand."""
    backend = tokenizer.backend_tokenizer
    # Others are searched for in the pieces.
    added = [t for t in backend.get_added_tokens_decoder().values() if not t.normalized]
    at_random = getattr(backend.model, "dropout", None)
    # Whether a single word is found depends on the characters beside it.
    if backend.encode_special_tokens or at_random or any(t.single_word for t in added):
        return []
    named = [*map(str, tokenizer.special_tokens_map.values())]
    plain = [t.content for t in added if not (t.lstrip or t.content[:1].isspace())]
    written = [token for token in plain if token and (token in template or token in named)]
    contents = [token.content for token in added]  # some tokenizers have thousands
    return [token for token in written if not _is_hidden(token, contents)]


def _is_hidden(token: str, tokens: Iterable[str]) -> bool:
    """Whether another token may be found where `token` stands: one around it, or over its start."""
    starts = tuple(token[:length] for length in range(1, len(token)))
    return any((token in t and token != t) or t.endswith(starts) for t in tokens)
