"""Text for people: progress, tables, sizes, and what is safe to print."""

import unicodedata
from collections.abc import Sequence

from tqdm import tqdm

# Zero-width joiners are kept: writing systems and emoji need them.
_HARMLESS = "\n\t\u200c\u200d"
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def bar(total: int, what: str, *, start: int = 0, shown: bool = True) -> tqdm:
    """Opens a progress bar on stderr with rate and time left."""
    return tqdm(total=total, initial=start, desc=what, disable=not shown, dynamic_ncols=True)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], widest: int = 40, left: int = 1
) -> str:
    """Aligns columns: the first `left` to the left, the others to the right.

    Each cell stands on one line, cut at `widest` characters.
    """

    def cell(text: str) -> str:
        text = " ".join(text.split())
        return text if len(text) <= widest else text[: widest - 3] + "..."

    lines = [[cell(text) for text in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])

    def padded(line):
        pairs = enumerate(zip(line, widths, strict=True))
        cells = (c.ljust(width) if i < left else c.rjust(width) for i, (c, width) in pairs)
        return "  ".join(cells).rstrip()

    return "\n".join(map(padded, lines))


def size(count: int) -> str:
    """Formats bytes: 512 bytes, 1.50 MB, 16.00 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,} bytes" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1000


def visible(text: str) -> str:
    """Escapes control characters, marks that reorder text and lone surrogates, as \\x00.

    Line breaks and tabs stay. The result can be encoded, and cannot steer a terminal.
    """

    def shown(c: str) -> str:
        if c in _HARMLESS or unicodedata.category(c) not in _HIDDEN:
            return c
        kind, width = ("x", 2) if c < "\u0100" else ("u", 4) if c < "\U00010000" else ("U", 8)
        return f"\\{kind}{ord(c):0{width}x}"

    return "".join(map(shown, text))


def cut(text: str, most: int) -> str:
    """Returns the text, or its first `most` characters with the length of the whole."""
    if len(text) <= most:
        return text
    return f"{text[:most]}... ({len(text):,} characters in all)"


def some(names: Sequence[str]) -> str:
    """Lists the first five."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
