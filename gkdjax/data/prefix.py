"""The global prefix, from whichever of its four keys the config sets.

`context.prefix_messages` has the messages, `prefix_file` is a JSON or YAML list of them. A plain
`system_prompt_file`, without the line breaks at its end, is a system message; so are the documents
of a `corpus` in `corpus_template`.
"""

import difflib
import json
import pathlib
from collections.abc import Iterator, Sequence

import yaml

from gkdjax.config import Context
from gkdjax.data.readers import json_value, read_rows, read_text
from gkdjax.data.row_schema import answer_text, kind, text
from gkdjax.types import Message
from gkdjax.utils.errors import UserError, one_line

_ROLES = ("system", "developer", "user", "assistant", "tool")


def read_prefix(context: Context) -> tuple[Message, ...]:
    """The messages that the teacher reads before each row that has no prefix of its own; or ()."""
    if context.prefix_file:
        return _file_messages(context.prefix_file)
    if context.system_prompt_file:
        where = f"context.system_prompt_file = {context.system_prompt_file}"
        return (Message("system", _plain(context.system_prompt_file, where)),)
    if context.corpus:
        documents = "\n\n".join(_documents(context.corpus))
        return (Message("system", context.corpus_template.replace("{corpus}", documents)),)
    return _messages(context.prefix_messages, "context.prefix_messages")


class _UniqueKeys(yaml.SafeLoader):
    """yaml itself would silently keep the last of two equal keys."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            message = f"{twice[0]!r} twice in one object"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return super().construct_mapping(node, deep)


def _file_messages(source: str) -> tuple[Message, ...]:
    where = f"context.prefix_file = {source}"
    if source.endswith(".json"):
        listed = json_value(source, where)
    elif source.endswith((".yaml", ".yml")):
        content = read_text(source, where)
        try:
            listed = yaml.load(content, Loader=_UniqueKeys)
        # A day that no month has is a ValueError, and so are too many digits.
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{where}: does not parse as YAML: {one_line(error)}") from error
    else:
        advice = "plain text is context.system_prompt_file"
        raise UserError(f"{where}: its name must end in .json, .yaml or .yml; {advice}")
    if not isinstance(listed, list):
        raise UserError(f"{where}: must be a list of {{role, content}}, not {kind(listed)}")
    if not listed:
        raise UserError(f"{where}: the list is empty; for no prefix, leave the key empty")
    return _messages(listed, pathlib.Path(source).name)


def _messages(listed: Sequence[object], where: str) -> tuple[Message, ...]:
    """Stricter than for a row: a prefix is written by hand, and is read before every row."""
    return tuple(_message(entry, f"{where}[{i}]") for i, entry in enumerate(listed))


def _message(entry: object, where: str) -> Message:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be {{role, content}}, not {kind(entry)}")
    for field in ("role", "content"):
        if field not in entry:
            raise UserError(f"{where} has no {field!r}; there is {sorted(map(str, entry))}")
    others = sorted(str(field) for field in entry if field not in ("role", "content"))
    if others:
        raise UserError(f"{where} has fields beyond role and content: {', '.join(others)}")
    role, content = (text(entry[field], f"{where}: {field}") for field in ("role", "content"))
    if role not in _ROLES:
        near = difflib.get_close_matches(role, _ROLES, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"it is one of {', '.join(_ROLES)}"
        raise UserError(f"{where}: role = {role!r} is unknown: {advice}")
    return Message(role, content)


def _plain(source: str, where: str) -> str:
    return text(read_text(source, where).rstrip("\n"), f"{where}: the text")


def _documents(source: str) -> Iterator[str]:
    where = f"context.corpus = {source}"
    if source.endswith(".txt"):
        yield _plain(source, where)
        return
    if source.endswith(".jsonl"):
        named = [*read_rows(source, "context.corpus")]
    elif source.endswith(".json"):
        listed = json_value(source, where)
        if not isinstance(listed, list):
            raise UserError(f"{where}: must be a list of documents, not {kind(listed)}")
        named = [(f"{pathlib.Path(source).name}:{i}", entry) for i, entry in enumerate(listed)]
    else:
        raise UserError(f"{where}: its name must end in .txt, .json or .jsonl")
    if not named:
        raise UserError(f"{where}: the list is empty")
    for name, entry in named:
        yield _document(entry, name)


def _document(entry: object, name: str) -> str:
    """A string as it is; the fields of an object, a line "Title: ..." each; null is absent."""
    if isinstance(entry, str):
        return text(entry, f"{name}: the document")
    if not isinstance(entry, dict):
        raise UserError(f"{name}: a document is a string or an object, not {kind(entry)}")
    fields = {field: value for field, value in entry.items() if value is not None}
    values = {field: _value(value, f"{name}: {field}") for field, value in fields.items()}
    if not values:
        raise UserError(f"{name}: the document has no field with a value")
    if len(values) == 1:
        return next(iter(values.values()))
    return "\n".join(f"{field[:1].upper()}{field[1:]}: {v}" for field, v in values.items())


def _value(value: object, where: str) -> str:
    """A string, a number, or a list of strings, as authors are."""
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return answer_text(value, where)
    if isinstance(value, list):
        if not value:
            raise UserError(f"{where} is an empty list; remove it")
        return ", ".join(text(item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, dict):
        raise UserError(f"{where} must be a string, a number or a list of strings, not an object")
    return text(value, where)
