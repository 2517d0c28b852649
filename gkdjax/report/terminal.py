"""The tables of a run, for a terminal."""

import pathlib
import textwrap

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
    """
    written = ["results.json", "metrics.jsonl", "report.png", "report.html", *results["exports"]]
    shown = [*tables(results), *side_by_side(results["samples"])]
    return "\n\n".join([*map(as_text, shown), f"{workdir}: {', '.join(written)}"])


def as_text(table: Table) -> str:
    """Title, columns and note."""
    if table.prose:
        lines = (f"{name}: {_one_line(text)}" for name, text in table.rows)
        indents = {"initial_indent": "  ", "subsequent_indent": "      "}
        body = "\n".join(textwrap.fill(line, _WIDTH, **indents) for line in lines)
    else:
        body = utils_text.table(table.header, table.rows, _WIDEST, table.labels)
    title, note = (textwrap.fill(text, _WIDTH) for text in (_one_line(table.title), table.note))
    return "\n".join(part for part in (title, body, note) if part)


def _one_line(text: str) -> str:
    return cut(" ".join(text.split()), _LONGEST)
