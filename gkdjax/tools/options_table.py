"""Prints the table of options of gkdjax/config/README.md, from the comments of config/schema.py.

python -m gkdjax.tools.options_table [--write]

A comment belongs to the field that it stands beside, or that the next line begins.
"""

import argparse
import ast
import dataclasses
import io
import json
import pathlib
import sys
import tokenize
import typing

from gkdjax.config import schema

README = pathlib.Path(schema.__file__).with_name("README.md")
BEGIN, END = "<!-- options: begin -->\n", "<!-- options: end -->\n"


def table() -> str:
    """The options as Markdown: a table for each section of the config.

    Raises:
      KeyError: a class of the schema is not in its source.
    """
    source = pathlib.Path(schema.__file__).read_text(encoding="utf-8")
    classes = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)}
    comments = _comments(source)
    parts = []
    for section, cls in typing.get_type_hints(schema.Config).items():
        parts.append(
            f"### {section}\n\n{cls.__doc__}\n\n| key | default | what it is |\n|---|---|---|"
        )
        parts.extend(_rows(section, cls, classes, comments))
        parts.append("")
    return "\n".join(parts)


def updated(readme: str) -> str:
    """The text of the README with today's table between its two marks.

    Raises:
      ValueError: a mark is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no {BEGIN.strip()} ... {END.strip()}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _rows(prefix: str, cls: type, classes: dict, comments: dict[int, str]) -> list[str]:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types, rows = typing.get_type_hints(cls), []
    for node in classes[cls.__name__].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        name = node.target.id
        if dataclasses.is_dataclass(types[name]):
            rows += _rows(f"{prefix}.{name}", types[name], classes, comments)
            continue
        beside = -node.end_lineno
        said = comments[beside] if beside in comments else _above(node.lineno, comments)
        default = _default(fields[name], node.value).replace("|", "\\|")
        rows.append(f"| `{prefix}.{name}` | `{default}` | {said.replace('|', chr(92) + '|')} |")
    return rows


def _comments(source: str) -> dict[int, str]:
    """Line -> its comment; the line's number is negative where code stands before it."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0] if alone else -token.start[0]] = token.string.lstrip("# ")
    return found


def _above(line: int, comments: dict[int, str]) -> str:
    lines = []
    while (line := line - 1) in comments:
        lines.insert(0, comments[line])
    return " ".join(lines)


def _default(field: dataclasses.Field, value: ast.expr) -> str:
    if field.default is dataclasses.MISSING:
        return json.dumps(field.default_factory())
    if isinstance(field.default, str | tuple):
        return json.dumps(field.default)
    return ast.unparse(value)


def main(argv: list[str] | None = None) -> int:
    """Prints the table, or puts it into the README."""
    parser = argparse.ArgumentParser(prog="python -m gkdjax.tools.options_table")
    parser.add_argument("--write", action="store_true", help=f"puts it into {README.name}")
    if parser.parse_args(argv).write:
        README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
