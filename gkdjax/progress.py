"""What a person sees while it runs, and the table at the end."""

from collections.abc import Sequence

from tqdm import tqdm


def bar(total: int, what: str, *, start: int = 0, shown: bool = True) -> tqdm:
    """A progress bar on stderr with rate and time left."""
    return tqdm(total=total, initial=start, desc=what, disable=not shown, dynamic_ncols=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded with blanks: the first to the left, the others to the right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line):
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    ruled = [text(lines[0]), "  ".join("-" * width for width in widths)]
    return "\n".join(ruled + [text(line) for line in lines[1:]])
