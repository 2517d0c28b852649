"""The tables of a run, for a terminal."""

import pathlib
import textwrap
from collections.abc import Iterator, Sequence

from gkdjax.report.tables import Table, side_by_side, tables
from gkdjax.utils import text as utils_text
from gkdjax.utils.text import cut

_WIDTH = 110
_WIDEST = 60  # characters of a cell
_LONGEST = 400  # characters of an answer or a reason


def render(results: dict, workdir: pathlib.Path) -> str:
    """The tables that are printed at the end.

    Args:
      results: the content of results.json.
      workdir: of the run.
    """
    written = ["results.json", "metrics.jsonl", "report.png", "report.html", *results["exports"]]
    shown = [*tables(results), *side_by_side(results["samples"])]
    return "\n\n".join([*map(as_text, shown), f"{workdir}: {', '.join(written)}"])


def as_text(table: Table) -> str:
    """Title, columns and note."""
    if table.prose:
        body = "\n".join(_paragraphs(table.rows))
    else:
        body = utils_text.table(table.header, table.rows, _WIDEST, table.labels)
    title, note = (_wrapped(text) for text in (_one_line(table.title), table.note))
    return "\n".join(part for part in (title, body, note) if part)


def _paragraphs(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for name, text in rows:
        yield _wrapped(f"{name}: {_one_line(text)}", "  ", "      ")


def _one_line(text: str) -> str:
    return cut(" ".join(text.split()), _LONGEST)


def _wrapped(text: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=rest)
