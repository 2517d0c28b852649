"""Rows of a JSON or JSONL file, or of the config itself -> Examples. Nothing is skipped."""

import json
import pathlib
from collections.abc import Iterator

from absl import logging

from gkdjax.errors import UserError
from gkdjax.types import Example, Message

_CONVERSATIONS = ("prompt", "turns", "messages")
_COLUMNS = (*_CONVERSATIONS, "response", "answer", "prefix_messages")


def read_examples(source: str | tuple[dict, ...], key: str) -> list[Example]:
    """All rows of `source`, in order.

    A row has exactly one of "prompt" (a string, one user message), "turns" or "messages" (lists
    of {"role", "content"}; a last message by the assistant is the response), and may have
    "response", "answer" (strings) and "prefix_messages". Null counts as absent. Other columns are
    ignored, which is logged once.

    Args:
      source: a .json file (a list of rows), a .jsonl file (a row a line), or the rows themselves.
      key: where the config has it, as "data.train"; it names the rows that have no file.

    Raises:
      UserError: naming the file or key, the line or row, and what is wrong with it.
    """
    from_file = isinstance(source, str)
    where = f"{key} = {source}" if from_file else key
    named = list(_file_rows(source, key) if from_file else _config_rows(source, key))
    if not named:
        raise UserError(f"{where}: holds no rows")
    ignored: set[str] = set()
    examples = [_example(row, name, i, ignored) for i, (name, row) in enumerate(named)]
    if ignored:
        logging.info("%s: columns that nothing reads: %s", where, ", ".join(sorted(ignored)))
    return examples


def _config_rows(rows: tuple[dict, ...], key: str) -> Iterator[tuple[str, object]]:
    for i, row in enumerate(rows):
        yield f"{key}:{i}", row


def _file_rows(source: str, key: str) -> Iterator[tuple[str, object]]:
    path = pathlib.Path(source)
    if path.suffix not in (".json", ".jsonl"):
        raise UserError(f"{key} = {source}: the name must end in .json or .jsonl")
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except OSError as error:
        raise UserError(f"{key} = {source}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{key} = {source}: is not UTF-8: {error}") from error
    if path.suffix == ".json":
        yield from _json_rows(path.name, text)
    else:
        yield from _jsonl_rows(path.name, text)


def _json_rows(file: str, text: str) -> Iterator[tuple[str, object]]:
    if not text.strip():
        raise UserError(f"{file}: the file is empty")
    rows = _parse(text, file, file, 1)
    if not isinstance(rows, list):
        raise UserError(f"{file}: must hold a list of rows, not {_kind(rows)}")
    for i, row in enumerate(rows):
        yield f"{file}:{i}", row


def _jsonl_rows(file: str, text: str) -> Iterator[tuple[str, object]]:
    if not text.strip():
        raise UserError(f"{file}: the file is empty")
    # Not splitlines(): JSON strings may hold other line separators, as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            name = f"{file}:{number}"
            yield name, _parse(line, name, file, number)


def _parse(text: str, where: str, file: str, first_line: int) -> object:
    def refuse(constant: str):
        raise UserError(f"{where}: {constant} is not JSON; write a number, a string or null")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(
            f"{file}: line {line}, column {error.colno}: does not parse as JSON: {error.msg}"
        ) from error


def _example(row: object, name: str, row_id: int, ignored: set[str]) -> Example:
    if not isinstance(row, dict):
        raise UserError(f"{name}: a row must be an object with columns, not {_kind(row)}")
    ignored.update(str(column) for column in row if column not in _COLUMNS)
    given = {c: row[c] for c in _COLUMNS if c in row and row[c] is not None}
    turns = _turns(given, name, ignored)
    response = _text(given["response"], f"{name}: response") if "response" in given else None
    if turns[-1].role == "assistant":
        if response is not None:
            raise UserError(
                f"{name}: which is the response, the column 'response' or the last message, which "
                "is from the assistant too? Leave one out"
            )
        *turns, (_, response) = turns
    if not turns:
        raise UserError(f"{name}: has no turns before the response; add the question to it")
    return Example(
        name=name,
        row_id=row_id,
        prefix=_messages(given, "prefix_messages", name, ignored),
        turns=tuple(turns),
        response=response,
        answer=_text(given["answer"], f"{name}: answer") if "answer" in given else None,
    )


def _turns(given: dict, name: str, ignored: set[str]) -> tuple[Message, ...]:
    found = [column for column in _CONVERSATIONS if column in given]
    if not found:
        raise UserError(f"{name}: has no turns; give it one of {', '.join(_CONVERSATIONS)}")
    if len(found) > 1:
        raise UserError(f"{name}: which are its turns, {' or '.join(found)}? Keep one column")
    if found == ["prompt"]:
        return (Message("user", _text(given["prompt"], f"{name}: prompt")),)
    turns = _messages(given, found[0], name, ignored)
    if not turns:
        raise UserError(f"{name}: has no turns: {found[0]} is an empty list")
    return turns


def _messages(given: dict, column: str, name: str, ignored: set[str]) -> tuple[Message, ...]:
    if column not in given:
        return ()
    listed = given[column]
    if not isinstance(listed, list | tuple):
        raise UserError(f"{name}: {column} must be a list of messages, not {_kind(listed)}")
    return tuple(_message(m, f"{name}: {column}[{i}]", ignored) for i, m in enumerate(listed))


def _message(message: object, where: str, ignored: set[str]) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"{where}: must be {{'role': ..., 'content': ...}}, not {_kind(message)}")
    for field in ("role", "content"):
        if field not in message:
            raise UserError(f"{where}: has no {field!r}; there is {sorted(map(str, message))}")
    ignored.update(f"messages[].{f}" for f in message if f not in ("role", "content"))
    role, content = (_text(message[field], f"{where}: {field}") for field in ("role", "content"))
    return Message(role, content)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be a string, not {_kind(value)}")
    if not value.strip():
        raise UserError(f"{where} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is no valid Unicode: {error.reason}") from error
    return value


def _kind(value: object) -> str:
    """A JSON value's type, in JSON's words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    kinds |= {int: "a number", float: "a number", type(None): "null"}
    return kinds[type(value)] if type(value) in kinds else type(value).__name__
