"""Checks of the values that a row, a message or a prefix is made of.

Each error starts with the place that the caller names, as "train.jsonl:17: prompt".
"""

import dataclasses
import datetime
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal

from gkdjax.types import Message
from gkdjax.utils.errors import UserError

# Names of roles in data, in lower case -> the role.
TOOL_ROLES = ("tool", "function", "observation", "ipython", "environment")  # never targets
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant"),
    **{role: role for role in ("system", "developer", "document", *TOOL_ROLES)},
}
_CALLERS = ("function_call", "tool_call", "function-call", "tool_calls")  # the assistant's calls
_TEMPLATE_TEXTS = ("reasoning_content", "reasoning", "thinking", "name", "tool_call_id")
_LEARN_FIELDS = ("weight", "trainable", "train", "loss")  # 0 or false: no target
_MASKS = ("mask", "masked")  # false or 0: as good as absent

# Fields that would change what is learnt -> what to write instead.
_NOT_TEXT = "only text is read; take such rows out, or that field where the text does without it"
_WHICH_LEARNT = (
    "write a message that is not to be learnt with 'weight': 0, or set"
    " context.target_content_pattern"
)
_MESSAGE_ADVICE = {
    "image images image_url video videos audio": _NOT_TEXT,
    "loss_mask train_detail mask masked": _WHICH_LEARNT,
    "thought thoughts": "write it as 'reasoning_content'",
    "tools functions": "give the row a column 'tools'",
    "function_call": "write it as 'tool_calls', a list",
}
_ROW_ADVICE = {
    "image images video videos audio audios": _NOT_TEXT,
    "context documents passage passages choices options": "write it into the question where the"
    " model is to read it, or remove the column",
    "chosen rejected": "preferences are not learnt; name what is to be learnt 'response', or"
    " 'messages' if it holds the question as well, and remove both columns",
    "reasoning_content reasoning thinking rationale": "write the response as a message of"
    " 'messages', with it as that message's 'reasoning_content'",
    "role": "a row is a whole conversation, not one message of it: write its messages, in order, as"
    " 'messages'; or remove the column",
    "weight": "rows count alike; take rows of weight 0 out, and remove the column",
    "label": "answers that are not wanted are not learnt; take such rows out",  # false, KTO's
    "loss_mask": _WHICH_LEARNT,
    "functions": "name the column 'tools'",
    "history": "write the whole conversation as 'messages'",
    "chat_template_kwargs": "set data.template_kwargs for all rows, and remove the column",
}
_MESSAGE_REFUSED, ROW_REFUSED = (
    {field: text for fields, text in advice.items() for field in fields.split()}
    for advice in (_MESSAGE_ADVICE, _ROW_ADVICE)
)
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
_KINDS |= {int: "a number", float: "a number", type(None): "null"}

_MOST_QUOTED = 60  # characters of a value in a message
_DEEPEST = 64  # nesting of tools and tool calls


@dataclasses.dataclass(frozen=True)
class Ambiguous:
    """A value of an arrow.json column that may be a number, true, false or null, or its text."""

    text: str  # as it is stored
    value: object  # unless it was text


def text(value: object, where: str) -> str:
    """`value`, if it is text that a tokenizer can read and a model can learn from.

    UserError: no string, nothing but white space, a NUL, or half of a surrogate pair.
    """
    value = encodable(value, where)
    if not value.replace("\ufeff", "").strip():  # a byte order mark is no white space to Python
        raise UserError(f"{where} is {'nothing but white space' if value else 'empty'}")
    return value


def encodable(value: object, where: str) -> str:
    """The same, but empty text and white space are fine."""
    if isinstance(value, Ambiguous):
        raise UserError(
            f"{where} is {value.text[:40]}, and whether that is text is not known in a column of"
            " type arrow.json; name the JSON file of the rows, or make all its values strings there"
        )
    if not isinstance(value, str):
        of_table = isinstance(value, datetime.date | datetime.time | datetime.timedelta | Decimal)
        advice = ": the table keeps no text of it; write strings, or name the JSON file"
        raise UserError(f"{where} must be a string, not {kind(value)}{advice if of_table else ''}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"half of a surrogate pair, {value[error.start]!r}, at character {error.start}"
        raise UserError(f"{where} is no valid Unicode: {half}; write the whole one") from error
    if "\0" in value:
        raise UserError(f"{where} has a NUL at character {value.index(chr(0))}; remove it")
    return value


def answer_text(value: object, where: str) -> str:
    """Text that an answer is compared with; a number as JSON writes it."""
    number = value.value if isinstance(value, Ambiguous) else value
    if not isinstance(number, int | float) or isinstance(number, bool):
        return text(value, where)
    if isinstance(value, Ambiguous):
        return value.text  # the same, whichever it was
    return _json(value, where)


def response_text(value: object, where: str) -> str:
    """Text that is learnt; a whole number as its digits, others are refused (1.50 is 1.5)."""
    if isinstance(value, Ambiguous) and type(value.value) is int:
        return value.text  # the same, whichever it was
    return str(value) if type(value) is int else text(value, where)


def messages(
    listed: object, where: str, unread: set[str], roles: Sequence[str] = ()
) -> tuple[Message, ...]:
    """A list of {"role", "content"}, or of ShareGPT's {"from", "value"} -> Messages.

    `unread` takes in the names of fields that nothing reads; `roles` stay as they are. UserError:
    no list, or a message without both fields, with both forms of them, of an unknown role, or with
    a field that would change what is learnt and that nothing reads.
    """
    if not isinstance(listed, list | tuple):
        raise UserError(f"{where} must be a list of messages, not {kind(listed)}")
    found = (_message(item, f"{where}[{i}]", unread, roles) for i, item in enumerate(listed))
    # An empty system message is as good as absent, as an empty system column is.
    return tuple(m for m in found if m.role != "system" or m.content.strip() or m.fields)


def leading_system(messages: Sequence[Message]) -> int:
    """How many system messages stand at the beginning."""
    return sum(1 for _ in itertools.takewhile(lambda m: m.role == "system", messages))


def _message(message: object, where: str, unread: set[str], roles: Sequence[str]) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"{where}: must be {{'role': ..., 'content': ...}}, not {kind(message)}")
    # Tables have every field in every row: null where a row does not have it.
    given = {field: value for field, value in message.items() if value is not None}
    forms = [form for form in (("role", "content"), ("from", "value")) if {*form} & {*given}]
    if len(forms) > 1:
        found = " and ".join(repr(f) for form in forms for f in form if f in given)
        raise UserError(f"{where}: has {found}; keep 'role' and 'content', or 'from' and 'value'")
    speaker, content = forms[0] if forms else ("role", "content")
    unmasked = {f: v for f, v in given.items() if f not in _MASKS or not is_number(v, 0)}
    refuse_unread(unmasked, _MESSAGE_REFUSED, where)
    calls = _parsed(given.get("tool_calls"), f"{where}: tool_calls")
    if is_nothing(calls):
        calls = None
    elif not isinstance(calls, list | tuple) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: tool_calls must be a list of objects, not {kind(calls)}")
    for field in (speaker, content):
        if field not in message and not (calls and field == content):
            there = shown_value(sorted(map(str, message)))
            raise UserError(f"{where}: has no {field!r}; there is {there}")
    read = (speaker, content, "tool_calls", *_TEMPLATE_TEXTS, *_LEARN_FIELDS)
    unread.update(f"messages[].{shown(field)}" for field in given if field not in read)
    role = _role(given.get(speaker), f"{where}: {speaker}", roles)
    value, place = given.get(content), f"{where}: {content}"
    if isinstance(value, list | tuple):
        value = "".join(_part(part, f"{place}[{i}]", unread) for i, part in enumerate(value))
    if calls is not None or role in ("system", *TOOL_ROLES):
        value = "" if value is None else encodable(value, place)
    else:
        value = text(value, place)
    fields = {f: encodable(given[f], f"{where}: {f}") for f in _TEMPLATE_TEXTS if f in given}
    fields = {field: value for field, value in fields.items() if value.strip()}
    if calls is not None:
        fields["tool_calls"] = calls
    beside = _json(dict(sorted(fields.items())), where) if fields else ""
    return Message(role, value, beside, _is_learnt(given, where))


def _role(value: object, where: str, roles: Sequence[str]) -> str:
    name = text(value, where)
    if name.lower() in ROLES:
        return ROLES[name.lower()]
    if name.lower() in _CALLERS:
        raise UserError(f"{where} = {name!r}: write the call as 'tool_calls' of the assistant")
    if name not in roles:
        known = f"it is one of {', '.join(ROLES)}, or of context.target_roles"
        raise UserError(f"{where} = {shown_value(name)} is nobody known: {known}")
    return name


def _part(part: object, where: str, unread: set[str]) -> str:
    """The text of a content part {"type": "text", "text": ...}."""
    if not isinstance(part, dict):
        raise UserError(f"{where}: must be {{'type': 'text', 'text': ...}}, not {kind(part)}")
    given = {field: value for field, value in part.items() if value is not None}
    if given.get("type") != "text" or "text" not in given:
        fields = shown_value(sorted(map(str, given)))
        found = f"type {shown_value(given['type'])}" if "type" in given else fields
        raise UserError(f"{where}: only {{'type': 'text', 'text': ...}} is read, not {found}")
    unread.update(f"content[].{shown(field)}" for field in given if field not in ("type", "text"))
    return encodable(given["text"], f"{where}: text")


def _is_learnt(given: Mapping, where: str) -> bool:
    values = {field: given[field] for field in _LEARN_FIELDS if field in given}
    for field, value in values.items():
        if not is_number(value, 0) and not is_number(value, 1):
            value = value.value if isinstance(value, Ambiguous) else value
            raise UserError(f"{where}: {field} = {shown_value(value)}: it is 1 or 0, true or false")
    return not any(is_number(value, 0) for value in values.values())


def tools(value: object, where: str) -> str:
    """A list of tools, or the JSON text of one -> the JSON text of it; "" if there are none."""
    value = _parsed(value, where)
    if value is None:
        return ""
    if not isinstance(value, list | tuple):
        raise UserError(f"{where} must be a list of tools, not {kind(value)}")
    for i, tool in enumerate(value):
        if not isinstance(tool, dict):
            raise UserError(f"{where}[{i}]: a tool is an object, not {kind(tool)}")
    return _json(value, where) if value else ""


def refuse_unread(given: Mapping, refused: Mapping[str, str], where: str) -> None:
    """Raises UserError for a field with a value that nothing reads and that would be missed."""
    for field, value in given.items():
        if field in refused and not is_nothing(value):
            raise UserError(f"{where}: has {field!r}, which nothing reads: {refused[field]}")


def is_nothing(value: object) -> bool:
    """Whether a field is as good as absent: null, an empty list, object or text."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {}, ())


def is_number(value: object, number: int) -> bool:
    """Whether a value is that number, or the boolean that is equal to it."""
    value = value.value if isinstance(value, Ambiguous) else value
    return isinstance(value, bool | int | float) and value == number


def shown(name: object) -> str:
    """A column's name for people, on one line and in any encoding."""
    name = str(name)
    return name if name.isprintable() else ascii(name)


def shown_value(value: object) -> str:
    """A value for people, cut to a length that a message can hold."""
    quoted = repr(value)
    return quoted if len(quoted) <= _MOST_QUOTED else f"{quoted[:_MOST_QUOTED]}..."


def kind(value: object) -> str:
    """A value's type, in JSON's words if JSON has it."""
    if isinstance(value, Ambiguous):
        return f"{value.text[:40]} (or its text, which looks the same in a column of arrow.json)"
    return _KINDS[type(value)] if type(value) in _KINDS else type(value).__name__


def _parsed(value: object, where: str) -> object:
    """The value of a JSON text, null if it is blank; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is text that does not parse as JSON: {error}") from error


def _json(value: object, where: str) -> str:
    """Compact JSON; keys stay in the data's order, as templates write them in it."""
    _check_json(value, where, _DEEPEST)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _check_json(value: object, where: str, depth: int) -> None:
    if depth == 0:
        raise UserError(f"{where[:200]}...: nests deeper than {_DEEPEST} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            encodable(key, f"{where}: a key")
            _check_json(item, f"{where}.{key}", depth - 1)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]", depth - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}, which is no number in JSON; write it as a string")
    elif value is not None and not isinstance(value, bool | int | float):
        encodable(value, where)
