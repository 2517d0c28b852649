"""Rows of data as they stand in JSON and JSONL files, Parquet files, datasets, or the config.

| the string in the config          | what is read                                            |
|-----------------------------------|---------------------------------------------------------|
| `rows.jsonl`                      | a row a line                                            |
| `rows.json`                       | a list, or an object with the list under one known name |
| `rows.parquet`                    | a table (pyarrow)                                       |
| `NAME`, `NAME:SPLIT` or           | a Hugging Face dataset (datasets); NAME is a directory  |
| `NAME:CONFIG:SPLIT`               | or a hub id, SPLIT as in `train`, `train[:500]`,        |
|                                   | `train[10%:20%]`, `train+test`                          |
"""

import json
import pathlib
import re
from collections.abc import Iterator

from gkdjax.data import tables
from gkdjax.data.fields import kind
from gkdjax.errors import UserError

LIST_NAMES = (
    *("pairs", "data", "samples", "completions", "training_samples", "training_prompts"),
    *("prompts", "questions", "conversations"),
    *("evaluation_samples", "test_samples", "qa_pairs"),
)
_SUFFIXES = (".json", ".jsonl", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COLON = re.compile(r":(?![^\[\]]*\])")  # not one within the brackets of a split

NamedRow = tuple[str, object]  # the row's name, as "train.jsonl:17", and what stands there


def read_rows(source: str | tuple[dict, ...], key: str) -> Iterator[NamedRow]:
    """All rows of `source` with their names, in order; nothing in them is checked.

    Args:
      source: rows, or a string as in this module's table.
      key: where the config has it, as "data.train"; it names the rows that have no file.

    Raises:
      UserError: naming the file or key, the line, and what is wrong with it.
    """
    if not isinstance(source, str):
        return ((f"{key}:{i}", row) for i, row in enumerate(source))
    where = f"{key} = {source}"
    if pathlib.Path(source).is_dir() and source.endswith(_SUFFIXES):
        raise UserError(f"{where}: Is a directory; as a dataset, write it {source}/")
    if source.endswith(".parquet"):
        return tables.parquet_rows(source, where)
    if source.endswith(".jsonl"):
        return jsonl_values(source, where)
    if source.endswith(".json"):
        return _json_rows(source, where)
    return _dataset_rows(source, where)


def read_text(source: str, where: str) -> str:
    """A text file without its byte order mark, its line breaks as "\\n".

    Raises:
      UserError: it cannot be read, is not UTF-8, or holds nothing; `where` starts the message.
    """
    try:
        text = pathlib.Path(source).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{where}: is not UTF-8: line {line} has the byte 0x{error.object[error.start]:02x};"
            " save the file as UTF-8"
        ) from error
    if not text.strip():
        raise UserError(f"{where}: the file is empty")
    return text


def json_value(source: str, where: str) -> object:
    """The one value of a .json file.

    Raises:
      UserError: as `read_text`, or it does not parse: with line and column.
    """
    file = pathlib.Path(source).name
    return _parse(read_text(source, where), file, file, 1)


def jsonl_values(source: str, where: str) -> Iterator[NamedRow]:
    """(name with the number of its line, value) for each line of a .jsonl file that has one.

    Raises:
      UserError: as `json_value`.
    """
    file = pathlib.Path(source).name
    # Not splitlines(): JSON strings may hold other line separators, as U+2028.
    for number, line in enumerate(read_text(source, where).split("\n"), start=1):
        if line.strip():
            name = f"{file}:{number}"
            yield name, _parse(line, name, file, number)


def _json_rows(source: str, where: str) -> Iterator[NamedRow]:
    file = pathlib.Path(source).name
    rows = json_value(source, where)
    if isinstance(rows, dict):
        rows = _listed(rows, file)
    if not isinstance(rows, list):
        raise UserError(f"{file}: must hold a list of rows, not {kind(rows)}")
    for i, row in enumerate(rows):
        yield f"{file}:{i}", row


def _listed(holder: dict, file: str) -> list:
    found = [name for name in LIST_NAMES if name in holder]
    if not found:
        raise UserError(
            f"{file}: must hold a list of rows, or an object with the list under one of"
            f" {', '.join(LIST_NAMES)}; it has {', '.join(map(repr, holder)) or 'nothing'}"
        )
    if len(found) > 1:
        raise UserError(f"{file}: which are its rows, {' or '.join(found)}? Keep one of them")
    if not isinstance(holder[found[0]], list):
        raise UserError(f"{file}: {found[0]} must be a list of rows, not {kind(holder[found[0]])}")
    return holder[found[0]]


def _dataset_rows(source: str, where: str) -> Iterator[NamedRow]:
    name, *rest = _COLON.split(source)
    if len(rest) > 2 or not all((name, *rest)):
        raise UserError(f"{where}: write a dataset as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT")
    split = rest[-1] if rest else None
    config = rest[0] if len(rest) == 2 else None
    path = pathlib.Path(name)
    if path.is_dir():
        return tables.directory_rows(path, config, split, where)
    if path.is_file():
        advice = "a file has no splits" if split else f"its name must end in {_either(_SUFFIXES)}"
        raise UserError(f"{where}: {advice}")
    if not _HUB_ID.fullmatch(name):
        raise UserError(
            f"{where}: No such file or directory, and a hub id would be 'name' or 'org/name'"
        )
    return tables.hub_rows(name, config, split, where)


def _either(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _parse(text: str, where: str, file: str, first_line: int) -> object:
    def refuse(constant: str):
        raise UserError(f"{where}: {constant} is not JSON; write a number, a string or null")

    def unique(pairs: list[tuple[str, object]]) -> dict:
        made = dict(pairs)
        if len(made) < len(pairs):  # json itself would keep the last and say nothing
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{where}: an object has {twice!r} twice; keep one")
        return made

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(
            f"{file}: line {line}, column {error.colno}: does not parse as JSON: {error.msg}"
        ) from error
