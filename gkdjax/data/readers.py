"""Rows of data as they stand in JSON and JSONL files, Parquet files, datasets, or the config.

| the string in the config          | what is read                                            |
|-----------------------------------|---------------------------------------------------------|
| `rows.jsonl`                      | a row a line                                            |
| `rows.json`                       | a list, or an object with the list under one known      |
|                                   | name, or a row a line                                   |
| `rows.parquet`                    | a table (pyarrow)                                       |
| `NAME`, `NAME:SPLIT` or           | a Hugging Face dataset (datasets); NAME is a directory  |
| `NAME:CONFIG:SPLIT`               | or a hub id, SPLIT as in `train`, `train[:500]`,        |
|                                   | `train[10%:20%]`, `train+test`                          |

JSON is always read here, also that of a directory: `datasets` says which files make up its splits,
and no more. What it would make of them is another thing wherever the values of a column are not
all of one type, or look like dates.
"""

import functools
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

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
    if os.path.isdir(source) and source.endswith(_SUFFIXES):
        raise UserError(f"{where}: Is a directory; as a dataset, write it {source}/")
    if source.endswith(".parquet"):
        return arrow.parquet_rows(source, where)
    if source.endswith(".jsonl"):
        return jsonl_values(source, where)
    if source.endswith(".json"):
        return _json_rows(read_text(source, where), pathlib.Path(source).name)
    return _dataset_rows(source, where)


def read_text(source: str, where: str) -> str:
    """A text file without its byte order mark, its line breaks as "\\n".

    Raises:
      UserError: it cannot be read, is not UTF-8, or holds nothing; `where` starts the message.
    """
    text = _text(source, where)
    if not text.strip():
        raise UserError(f"{where}: the file is empty")
    return text


def _text(source: str, where: str) -> str:
    """The same, and a file may be empty."""
    try:
        return pathlib.Path(source).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{where[:400]}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{where}: is not UTF-8: line {line} has the byte 0x{error.object[error.start]:02x};"
            " save the file as UTF-8"
        ) from error
    except ValueError as error:  # a NUL
        raise UserError(f"{shown(where[:400])}: is no path: {error}") from error


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
    return _lines(read_text(source, where), pathlib.Path(source).name)


def _lines(text: str, file: str) -> Iterator[NamedRow]:
    # Not splitlines(): JSON strings may hold other line separators, as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            name = f"{file}:{number}"
            yield name, _parse(line, name, file, number)


def _json_rows(text: str, file: str) -> Iterator[NamedRow]:
    try:
        rows = _parse(text, file, file, 1)
    except UserError:
        if not _has_a_row_a_line(text):
            raise
        yield from _lines(text, file)
        return
    if isinstance(rows, dict):
        rows = _listed(rows, file)
    if not isinstance(rows, list):
        raise UserError(f"{file}: must hold a list of rows, not {kind(rows)}")
    for i, row in enumerate(rows):
        yield f"{file}:{i}", row


def _has_a_row_a_line(text: str) -> bool:
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _listed(holder: dict, file: str) -> list:
    found = [name for name in LIST_NAMES if name in holder]
    if not found:
        raise UserError(
            f"{file}: must hold a list of rows, or an object with the list under one of"
            f" {', '.join(LIST_NAMES)}; it has {shown_value([*holder]) if holder else 'nothing'}"
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
    if os.path.isdir(name):
        files = arrow.json_files(path, config, where)
        if files is None:
            return arrow.directory_rows(path, config, split, where)
        return _directory_rows(path, files, split, where)
    if os.path.isfile(name):
        advice = "a file has no splits" if split else f"its name must end in {_either(_SUFFIXES)}"
        raise UserError(f"{where}: {advice}")
    if not _HUB_ID.fullmatch(name):
        raise UserError(
            f"{where[:400]}: No such file or directory, and a hub id would be 'name' or 'org/name'"
        )
    return arrow.hub_rows(name, config, split, where)


class _Splits(Mapping):
    """Name of a split -> how many rows it has; its files are read when that is asked."""

    def __init__(self, files: Mapping[str, Sequence[str]], path: pathlib.Path):
        self._files, self._path = files, path.absolute()
        self.rows = functools.cache(self._rows)

    def __getitem__(self, split: str) -> int:
        return len(self.rows(split))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _rows(self, split: str) -> list[object]:
        return [row for file in self._files[split] for row in self._rows_of(pathlib.Path(file))]

    def _rows_of(self, file: pathlib.Path) -> Iterator[object]:
        name = str(file.relative_to(self._path) if file.is_relative_to(self._path) else file)
        text = _text(str(file), name)
        if text.strip():  # one of several may be empty
            read = _json_rows if file.suffix == ".json" else _lines
            yield from (row for _, row in read(text, name))


def _directory_rows(
    path: pathlib.Path, files: Mapping[str, Sequence[str]], split: str | None, where: str
) -> Iterator[NamedRow]:
    """Rows of JSON files, by split; named as `arrow.directory_rows` does."""
    name, splits = path.absolute().name, _Splits(files, path)
    if split is None and len(splits) > 1:
        first = next(iter(splits))
        raise UserError(f"{where}: which split of {', '.join(splits)}? Write {name}:{first}")
    split = split or next(iter(splits))
    parts = arrow.parts_of("+".join(splits) if split == "all" else split, splits, where)
    rows = (row for part, start, end in parts for row in splits.rows(part)[start:end])
    return ((f"{name}:{split}:{i}", row) for i, row in enumerate(rows))


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
        told = error.msg
        if text.startswith("\ufeff", error.pos):
            told = "a byte order mark, as where files were joined; remove it"
        raise UserError(
            f"{file}: line {line}, column {error.colno}: does not parse as JSON: {told}"
        ) from error
    except RecursionError as error:
        raise UserError(
            f"{where}: nests lists or objects too deeply to be read; remove that field"
        ) from error
    except UserError:
        raise
    except ValueError as error:  # Python's limit for the digits of an integer
        most = sys.get_int_max_str_digits()
        digits = re.search(rf"\d{{{most + 1},}}", text)
        if digits is None:
            raise UserError(f"{where}: cannot be read: {error}") from error
        line = first_line + text.count("\n", 0, digits.start())
        raise UserError(
            f"{file}: line {line}: has an integer of {len(digits[0])} digits, and {most} are the"
            " most; write it as a string, or remove it"
        ) from error
