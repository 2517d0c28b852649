"""Prints the options for gkdjax/config/README.md: types and comments of config/schema.py.

python -m gkdjax.tools.options_table [--write]

A comment stands beside its field, or in the lines above it.
"""

import argparse
import ast
import dataclasses
import itertools
import json
import pathlib
import sys
import typing

from gkdjax.config import schema
from gkdjax.config.parse import readable
from gkdjax.utils.files import write_text

README = pathlib.Path(schema.__file__).with_name("README.md")
BEGIN, END = "<!-- options: begin -->\n", "<!-- options: end -->\n"


def table() -> str:
    """The options as Markdown: a table for each section of the config."""
    source = pathlib.Path(schema.__file__).read_text(encoding="utf-8")
    classes = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)}
    parts = []
    for section, cls in typing.get_type_hints(schema.Config).items():
        parts.append(
            f"### {section}\n\n{cls.__doc__}\n\n"
            "| key | default | values | what it is |\n|---|---|---|---|"
        )
        parts.extend(_rows(section, cls, classes, source.splitlines()))
        parts.append("")
    return "\n".join(parts)


def updated(readme: str) -> str:
    """The README with today's table between its two marks; ValueError where one is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no {BEGIN.strip()} ... {END.strip()}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _rows(prefix: str, cls: type, classes: dict[str, ast.ClassDef], lines: list[str]) -> list[str]:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types, rows = typing.get_type_hints(cls, include_extras=True), []
    for node in classes[cls.__name__].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        name = node.target.id
        if dataclasses.is_dataclass(types[name]):
            rows += _rows(f"{prefix}.{name}", types[name], classes, lines)
            continue
        cells = f"`{prefix}.{name}`", f"`{_default(fields[name], node.value)}`"
        cells += readable(types[name]).replace("'", '"'), _comment(node, lines)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return rows


def _comment(node: ast.AnnAssign, lines: list[str]) -> str:
    beside = lines[node.end_lineno - 1][node.end_col_offset :].strip()
    if beside:
        return beside.lstrip("# ")
    before = (line.strip() for line in reversed(lines[: node.lineno - 1]))
    above = itertools.takewhile(lambda line: line.startswith("#"), before)
    return " ".join(line.lstrip("# ") for line in reversed([*above]))


def _default(field: dataclasses.Field, value: ast.expr) -> str:
    if field.default is dataclasses.MISSING:
        return json.dumps(field.default_factory())
    if isinstance(field.default, str | tuple):
        return json.dumps(field.default)
    return ast.unparse(value)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gkdjax.tools.options_table")
    parser.add_argument("--write", action="store_true", help=f"puts it into {README.name}")
    if parser.parse_args(argv).write:
        write_text(README, updated(README.read_text(encoding="utf-8")))
    else:
        print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
