"""What a person sees while it runs, and the table at the end."""

import hashlib
import unicodedata
from collections.abc import Sequence

from tqdm import tqdm

_WIDEST_CELL = 40


# Joiners that writing systems and emoji need.
_HARMLESS = "\u200c\u200d"
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def bar(total: int, what: str, *, start: int = 0, shown: bool = True) -> tqdm:
    """A progress bar on stderr with rate and time left."""
    return tqdm(total=total, initial=start, desc=what, disable=not shown, dynamic_ncols=True)


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    widest: int = _WIDEST_CELL,
    left: int = 1,
) -> str:
    """Columns padded with blanks: the first `left` to the left, the others to the right.

    Each cell stands on one line, cut at `widest` characters.
    """
    lines = [[_cell(text, widest) for text in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def padded(line):
        pairs = list(zip(line, widths, strict=True))
        cells = [cell.ljust(width) for cell, width in pairs[:left]]
        cells += [cell.rjust(width) for cell, width in pairs[left:]]
        return "  ".join(cells).rstrip()

    ruled = [padded(lines[0]), "  ".join("-" * width for width in widths)]
    return "\n".join(ruled + [padded(line) for line in lines[1:]])


def size(count: int) -> str:
    """Bytes as people read them: 512 bytes, 1.50 MB, 16.00 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,} bytes" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1000


def _cell(text: str, widest: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= widest else text[: widest - 3] + "..."


def visible(text: str) -> str:
    """Control characters, marks that reorder text and halves of pairs become escapes, as \\x00.

    Line breaks and tabs stay. What is left can be encoded, and cannot steer a terminal.
    """
    return "".join(_escaped(c) if _is_hidden(c) else c for c in text)


def cut(text: str, most: int) -> str:
    """The text, or its first `most` characters with the length of the whole."""
    if len(text) <= most:
        return text
    return f"{text[:most]}... ({len(text):,} characters in all)"


def _is_hidden(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in _HIDDEN and character not in _HARMLESS


def _escaped(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def digest(content: bytes) -> str:
    """16 hexadecimal digits of SHA-256: millions of prompts must not share one."""
    return hashlib.sha256(content).hexdigest()[:16]


def some(names: Sequence[str]) -> str:
    """The first few, for people."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
