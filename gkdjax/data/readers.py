"""Rows of data from JSON, JSONL and Parquet files, from datasets, or from the config.

JSON is always read here, also that of a directory: `datasets` only says which files are a split. It
would change values wherever those of a column are not all of one type, or look like dates.
"""

import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator

from gkdjax.data import arrow
from gkdjax.data.row_schema import kind, shown, shown_value
from gkdjax.utils.errors import UserError

LIST_NAMES = (
    *("pairs", "data", "samples", "completions", "training_samples", "training_prompts"),
    *("prompts", "questions", "conversations"),
    *("evaluation_samples", "test_samples", "qa_pairs"),
)
_SUFFIXES = (".json", ".jsonl", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COLON = re.compile(r":(?![^\[\]]*\])")  # not one within the brackets of a split

_NamedRow = tuple[str, object]  # the row's name, as "train.jsonl:17", and its value


def read_rows(source: str | tuple[dict, ...], key: str) -> Iterator[_NamedRow]:
    """All rows of `source` with their names, in order; nothing in them is checked.

    Args:
      source: the rows themselves; a .json, .jsonl or .parquet file; or a dataset, `NAME`,
        `NAME:SPLIT` or `NAME:CONFIG:SPLIT`, NAME being a directory or a hub id.
      key: of the config, as "data.train"; it names the rows that have no file.

    Raises:
      UserError: naming the file or key, the line, and what is wrong with it.
    """
    if not isinstance(source, str):
        return ((f"{key}:{i}", row) for i, row in enumerate(source))
    where = f"{key} = {source}"
    if source.endswith(_SUFFIXES):
        if os.path.isdir(source):
            raise UserError(f"{where}: Is a directory; as a dataset, write it {source}/")
        if source.endswith(".parquet"):
            return arrow.parquet_rows(source, where)
        read = _lines if source.endswith(".jsonl") else _json_rows
        return read(read_text(source, where), pathlib.Path(source).name)
    name, *rest = _COLON.split(source)
    if len(rest) > 2 or not all((name, *rest)):
        raise UserError(f"{where}: write a dataset as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT")
    split = rest[-1] if rest else None
    config = rest[0] if len(rest) == 2 else None
    if os.path.isdir(name):
        files = arrow.json_files(name, config, where)
        if files is not None:
            return _directory_rows(pathlib.Path(name).absolute(), files, split, where)
    elif os.path.isfile(name):
        ends = f"its name must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
        raise UserError(f"{where}: {'a file has no splits' if split else ends}")
    elif not _HUB_ID.fullmatch(name):
        raise UserError(
            f"{where[:400]}: No such file or directory, and a hub id would be 'name' or 'org/name'"
        )
    return arrow.dataset_rows(name, config, split, where)


def read_text(source: str, where: str, *, may_be_empty: bool = False) -> str:
    """A text file without its byte order mark, its line breaks as "\\n".

    Raises:
      UserError: it cannot be read, is not UTF-8, or is empty; `where` starts the message.
    """
    try:
        text = pathlib.Path(source).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{where[:400]}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = f"line {line} has the byte 0x{error.object[error.start]:02x}"
        raise UserError(f"{where}: is not UTF-8: {byte}; save the file as UTF-8") from error
    except ValueError as error:  # a NUL
        raise UserError(f"{shown(where[:400])}: is no path: {error}") from error
    if not text.strip() and not may_be_empty:
        raise UserError(f"{where}: the file is empty")
    return text


def json_value(source: str, where: str) -> object:
    """The one value of a .json file; errors are those of `read_text`, or name line and column."""
    file = pathlib.Path(source).name
    return _parse(read_text(source, where), file, file, 1)


def _lines(text: str, file: str) -> Iterator[_NamedRow]:
    """A row for each line that has one; its name has the number of the line."""
    # Not splitlines(): JSON strings may hold other line separators, as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            name = f"{file}:{number}"
            yield name, _parse(line, name, file, number)


def _json_rows(text: str, file: str) -> Iterator[_NamedRow]:
    """The rows of a list, of an object with the list under a known name, or a row a line."""
    try:
        rows = _parse(text, file, file, 1)
    except UserError:
        if not _has_row_a_line(text):
            raise
        yield from _lines(text, file)
        return
    what = "must hold"
    if isinstance(rows, dict):
        found = [name for name in LIST_NAMES if name in rows]
        if not found:
            raise UserError(
                f"{file}: must hold a list of rows, or an object with the list under one of"
                f" {', '.join(LIST_NAMES)}; it has {shown_value([*rows]) if rows else 'nothing'}"
            )
        if len(found) > 1:
            raise UserError(f"{file}: which are its rows, {' or '.join(found)}? Keep one of them")
        rows, what = rows[found[0]], f"{found[0]} must be"
    if not isinstance(rows, list):
        raise UserError(f"{file}: {what} a list of rows, not {kind(rows)}")
    for i, row in enumerate(rows):
        yield f"{file}:{i}", row


def _has_row_a_line(text: str) -> bool:
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _directory_rows(
    directory: pathlib.Path, files: dict[str, list[str]], split: str | None, where: str
) -> Iterator[_NamedRow]:
    """Rows of JSON files, by split; named as `arrow.dataset_rows` does."""
    split = split or arrow.only_split([*files], directory.name, where)
    spec = "+".join(files) if split == "all" else split
    used = {part.partition("[")[0].strip() for part in spec.split("+")}
    rows = {name: [*_rows_of(files[name], directory)] for name in files if name in used}
    lengths = {name: len(rows[name]) if name in rows else 0 for name in files}
    parts = arrow.split_parts(spec, lengths, where)
    found = (row for name, start, end in parts for row in rows[name][start:end])
    return ((f"{directory.name}:{split}:{i}", row) for i, row in enumerate(found))


def _rows_of(files: list[str], directory: pathlib.Path) -> Iterator[object]:
    for file in map(pathlib.Path, files):
        name = str(file.relative_to(directory) if file.is_relative_to(directory) else file)
        text = read_text(str(file), name, may_be_empty=True)  # as one of several
        if text.strip():
            read = _json_rows if file.suffix == ".json" else _lines
            yield from (row for _, row in read(text, name))


def _parse(text: str, where: str, file: str, first_line: int) -> object:
    def refuse(constant: str):
        raise UserError(f"{where}: {constant} is not JSON; write a number, a string or null")

    def unique(pairs: list[tuple[str, object]]) -> dict:
        made = dict(pairs)
        if len(made) < len(pairs):  # json itself would silently keep the last
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{where}: an object has {twice!r} twice; keep one")
        return made

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, error.msg
        if text.startswith("\ufeff", error.pos):
            reason = "a byte order mark, as where files were joined; remove it"
        place = f"{file}: line {line}, column {error.colno}"
        raise UserError(f"{place}: does not parse as JSON: {reason}") from error
    except RecursionError as error:
        raise UserError(f"{where}: nests lists or objects too deeply; remove that field") from error
    except UserError:
        raise
    except ValueError as error:  # Python's limit for the digits of an integer
        most = sys.get_int_max_str_digits()
        digits = re.search(rf"\d{{{most + 1},}}", text)
        if digits is None:
            raise UserError(f"{where}: cannot be read: {error}") from error
        line = first_line + text.count("\n", 0, digits.start())
        number = f"has an integer of {len(digits[0])} digits, and {most} are the most"
        raise UserError(f"{file}: line {line}: {number}; write it as a string") from error
