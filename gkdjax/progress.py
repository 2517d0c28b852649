"""What a person sees while it runs, and the table at the end."""

from collections.abc import Sequence

from tqdm import tqdm

_WIDEST_CELL = 40


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
