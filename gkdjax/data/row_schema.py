"""Checks of the values that a row, a message or a prefix is made of.

Each error starts with the place that the caller names, as "train.jsonl:17: prompt".
"""

import dataclasses
import datetime
import decimal
import json
import math
from collections.abc import Mapping, Sequence

from gkdjax.types import Message
from gkdjax.utils.errors import UserError

# Who speaks, in lower case -> the role. Names for one role may stand side by side.
TOOL_ROLES = ("tool", "function", "observation", "ipython", "environment")  # never targets
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant"),
    **{role: role for role in ("system", "developer", "document", *TOOL_ROLES)},
}
_CALLERS = ("function_call", "tool_call", "function-call", "tool_calls")  # the assistant's calls

# Of a message: what the chat template is given beside role and content, under the same names.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_TEMPLATE_FIELDS = ("tool_calls", *_THOUGHTS, "name", "tool_call_id")
_LEARN_FIELDS = ("weight", "trainable", "train", "loss")  # 0 or false: no target

_NOT_TEXT = "only text is read; take such rows out, or that field where the text does without it"
_WHICH_LEARNT = (
    "write a message that is not to be learnt with 'weight': 0, or set"
    " context.target_content_pattern"
)
_MASKS = ("mask", "masked")  # false or 0: as good as absent
# Fields that change what is to be learnt, and what to write instead.
_MESSAGE_REFUSED = {
    **dict.fromkeys(("image", "images", "image_url", "video", "videos", "audio"), _NOT_TEXT),
    **dict.fromkeys(("loss_mask", "train_detail", *_MASKS), _WHICH_LEARNT),
    **dict.fromkeys(("thought", "thoughts"), "write it as 'reasoning_content'"),
    "function_call": "write it as 'tool_calls', a list",
    "tools": "give the row a column 'tools'",
    "functions": "give the row a column 'tools'",
}
_IN_QUESTION = "write it into the question where the model is to read it, or remove the column"
ROW_REFUSED = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _NOT_TEXT),
    **dict.fromkeys(
        ("context", "documents", "passage", "passages", "choices", "options"), _IN_QUESTION
    ),
    **dict.fromkeys(
        ("chosen", "rejected"),
        "preferences are not learnt; name what is to be learnt 'response', or 'messages' if it"
        " holds the question as well, and remove both columns",
    ),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking", "rationale"),
        "write the response as a message of 'messages', with it as that message's"
        " 'reasoning_content'",
    ),
    "role": "a row is a whole conversation, not one message of it: write its messages, in order, as"
    " 'messages'; or remove the column",
    "weight": "rows count alike; take rows of weight 0 out, and remove the column",
    "label": "answers that are not wanted are not learnt; take such rows out",  # false, KTO's
    "loss_mask": _WHICH_LEARNT,
    "functions": "name the column 'tools'",
    "history": "write the whole conversation as 'messages'",
    "chat_template_kwargs": "set data.template_kwargs for all rows, and remove the column",
}

_QUOTED = 60  # characters of a value in a message
_DEEPEST = 64  # nesting of tools and tool calls


@dataclasses.dataclass(frozen=True)
class Ambiguous:
    """What a column of type arrow.json holds for a number, and for text that reads as one.

    So for true, false and null.
    """

    text: str  # as it is stored
    value: object  # what it is if it was no text


def text(value: object, where: str) -> str:
    """`value` as it is, if it is text that a tokenizer can read and a model can learn from.

    Line breaks of any kind and emoji are fine.

    Raises:
      UserError: no string, nothing but white space, a NUL, or half of a surrogate pair.
    """
    value = encodable(value, where)
    if not value.replace("\ufeff", "").strip():  # a byte order mark is none to Python
        raise UserError(f"{where} is {'nothing but white space' if value else 'empty'}")
    return value


def encodable(value: object, where: str) -> str:
    """The same, and text that says nothing is fine, too."""
    if isinstance(value, Ambiguous):
        raise UserError(
            f"{where} is {value.text[:40]}, and whether that is text is not known: a column of type"
            " arrow.json stores it as the text of the same characters; name the JSON file that"
            " the rows were in, or make each value of the column a string there"
        )
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        raise UserError(
            f"{where} must be a string, not {kind(value)}: the table keeps no text of it; name the"
            " JSON file that the rows were in, or write the column anew as strings"
        )
    if not isinstance(value, str):
        raise UserError(f"{where} must be a string, not {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} is no valid Unicode: half of a surrogate pair, {value[error.start]!r}, at"
            f" character {error.start}; remove it, or write the whole character"
        ) from error
    if "\0" in value:
        raise UserError(
            f"{where} has a NUL at character {value.index(chr(0))}; remove it: binary data?"
        )
    return value


def answer_text(value: object, where: str) -> str:
    """Text that an answer is compared with; a number as JSON writes it.

    Raises:
      UserError: as `text`, or a number that JSON does not have.
    """
    if isinstance(value, Ambiguous) and _is_number(value.value):
        return value.text  # the same, whichever it was
    if not _is_number(value):
        return text(value, where)
    if not math.isfinite(value):
        raise UserError(f"{where} is {value}, which is no number in JSON; write it as a string")
    return json.dumps(value)


def response_text(value: object, where: str) -> str:
    """Text that is to be learnt; a whole number as its digits, which can be written in one way.

    Raises:
      UserError: as `text`; so are other numbers, as 1.50 is 1.5 by the time that it is read.
    """
    if isinstance(value, Ambiguous) and type(value.value) is int:
        return value.text  # the same, whichever it was
    return str(value) if type(value) is int else text(value, where)


def messages(
    listed: object, where: str, unread: set[str], roles: Sequence[str] = ()
) -> tuple[Message, ...]:
    """A list of {"role", "content"}, or of ShareGPT's {"from", "value"} -> Messages.

    Args:
      listed: what the data have.
      where: it stands.
      unread: takes in the names of fields that nothing reads.
      roles: that stay as they are, beside those that are known.

    Raises:
      UserError: no list, or a message without both fields, with both forms of them, by nobody
        known, or with a field that would change what is learnt and that nothing reads.
    """
    if not isinstance(listed, list | tuple):
        raise UserError(f"{where} must be a list of messages, not {kind(listed)}")
    found = (_message(item, f"{where}[{i}]", unread, roles) for i, item in enumerate(listed))
    # A system message that says nothing is as good as absent, as an empty system column is.
    return tuple(m for m in found if m.role != "system" or m.content.strip() or m.fields)


def tools(value: object, where: str) -> str:
    """A list of tools, or the JSON text of one -> the JSON text of it; "" if there are none.

    Raises:
      UserError: something else, or what JSON cannot hold.
    """
    value = _parsed(value, where)
    if value is None:
        return ""
    if not isinstance(value, list | tuple):
        raise UserError(f"{where} must be a list of tools, not {kind(value)}")
    for i, tool in enumerate(value):
        if not isinstance(tool, dict):
            raise UserError(f"{where}[{i}]: a tool is an object, not {kind(tool)}")
    return _json(value, where) if value else ""


def _parsed(value: object, where: str) -> object:
    """What a JSON text holds, null if it is blank; other values as they are."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is text that does not parse as JSON: {error}") from error


def refuse_unread(given: Mapping, refused: Mapping[str, str], where: str) -> None:
    """Raises UserError for a field with a value that nothing reads and that would be missed."""
    for field, advice in refused.items():
        if field in given and not says_nothing(given[field]):
            raise UserError(f"{where}: has {field!r}, which nothing reads: {advice}")


def says_nothing(value: object) -> bool:
    """Whether a field is as good as absent: null, an empty list, object or text."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {}, ())


def shown(name: object) -> str:
    """A column's name for people, on one line and in any encoding."""
    name = str(name)
    return name if name.isprintable() else ascii(name)


def shown_value(value: object) -> str:
    """A value for people, cut to what a message can hold."""
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def kind(value: object) -> str:
    """A value's type, in JSON's words where JSON has it."""
    if isinstance(value, Ambiguous):
        return f"{value.text[:40]} (or its text, which looks the same in a column of arrow.json)"
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    kinds |= {int: "a number", float: "a number", type(None): "null"}
    return kinds[type(value)] if type(value) in kinds else type(value).__name__


def _message(message: object, where: str, unread: set[str], roles: Sequence[str]) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"{where}: must be {{'role': ..., 'content': ...}}, not {kind(message)}")
    # Tables have every field in every row: null where a row does not have it.
    given = {field: value for field, value in message.items() if value is not None}
    forms = [form for form in (("role", "content"), ("from", "value")) if {*form} & {*given}]
    if len(forms) > 1:
        found = " and ".join(repr(f) for form in forms for f in form if f in given)
        raise UserError(f"{where}: has {found}; keep 'role' and 'content', or 'from' and 'value'")
    form = forms[0] if forms else ("role", "content")
    unmasked = {f: v for f, v in given.items() if f not in _MASKS or not is_number(v, 0)}
    refuse_unread(unmasked, _MESSAGE_REFUSED, where)
    calls = _tool_calls(given, where)
    for field in form:
        if field not in message and not (calls and field == form[1]):
            there = shown_value(sorted(map(str, message)))
            raise UserError(f"{where}: has no {field!r}; there is {there}")
    read = (*form, *_TEMPLATE_FIELDS, *_LEARN_FIELDS)
    unread.update(f"messages[].{shown(field)}" for field in given if field not in read)
    role = _role(text(message[form[0]], f"{where}: {form[0]}"), f"{where}: {form[0]}", roles)
    said = given.get(form[1])
    may_be_empty = bool(calls) or role in ("system", *TOOL_ROLES)
    content = _content(said, f"{where}: {form[1]}", unread, may_be_empty)
    beside = calls | _told_beside(given, where)
    fields = _json(dict(sorted(beside.items())), where) if beside else ""
    return Message(role, content, fields, _is_learnt(given, where))


def known_role(said: str) -> str | None:
    """Who is meant by a name that data sets use; None: nobody known."""
    return _ROLES.get(said.lower())


def _role(said: str, where: str, roles: Sequence[str]) -> str:
    known = known_role(said)
    if known is not None:
        return known
    if said.lower() in _CALLERS:
        raise UserError(
            f"{where} = {said!r}: write the call as 'tool_calls', a list, of a message by the"
            " assistant"
        )
    if said not in roles:
        raise UserError(
            f"{where} = {shown_value(said)} is nobody known: it is one of {', '.join(_ROLES)};"
            " rename it, or name it in context.target_roles to train what it says"
        )
    return said


def _content(value: object, where: str, unread: set[str], may_be_empty: bool) -> str:
    if isinstance(value, list | tuple):
        value = "".join(_part(part, f"{where}[{i}]", unread) for i, part in enumerate(value))
    if value is None and may_be_empty:
        return ""
    return encodable(value, where) if may_be_empty else text(value, where)


def _part(part: object, where: str, unread: set[str]) -> str:
    """The text of a content part {"type": "text", "text": ...}."""
    if not isinstance(part, dict):
        raise UserError(f"{where}: must be {{'type': 'text', 'text': ...}}, not {kind(part)}")
    given = {field: value for field, value in part.items() if value is not None}
    if "type" not in given or given["type"] != "text" or "text" not in given:
        there = given["type"] if "type" in given else sorted(map(str, given))
        found = f"{'type ' if 'type' in given else ''}{shown_value(there)}"
        raise UserError(f"{where}: only {{'type': 'text', 'text': ...}} is read, not {found}")
    unread.update(f"content[].{shown(field)}" for field in given if field not in ("type", "text"))
    return encodable(given["text"], f"{where}: text")


def _tool_calls(given: Mapping, where: str) -> dict[str, object]:
    calls = _parsed(given.get("tool_calls"), f"{where}: tool_calls")
    if says_nothing(calls):
        return {}
    if not isinstance(calls, list | tuple) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: tool_calls must be a list of objects, not {kind(calls)}")
    return {"tool_calls": calls}


def _told_beside(given: Mapping, where: str) -> dict[str, str]:
    """Thoughts, the speaker's name, the call that is answered; empty ones count as absent."""
    fields = (f for f in _TEMPLATE_FIELDS if f != "tool_calls" and f in given)
    said = {field: encodable(given[field], f"{where}: {field}") for field in fields}
    return {field: value for field, value in said.items() if value.strip()}


def _is_learnt(given: Mapping, where: str) -> bool:
    learnt = True
    for field in _LEARN_FIELDS:
        if field not in given:
            continue
        value = given[field]
        value = value.value if isinstance(value, Ambiguous) else value
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(
                f"{where}: {field} = {shown_value(value)}: it is 1 or 0, true or false; a share of"
                " a message is not learnt"
            )
        learnt = learnt and bool(value)
    return learnt


def is_number(value: object, number: int) -> bool:
    """Whether a value is that number, or the boolean that is equal to it."""
    value = value.value if isinstance(value, Ambiguous) else value
    return isinstance(value, bool | int | float) and value == number


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json(value: object, where: str) -> str:
    """Compact JSON; the order of keys is the data's, as templates write them in it."""
    _check_json(value, where, _DEEPEST)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _check_json(value: object, where: str, depth: int) -> None:
    if depth == 0:
        raise UserError(f"{where[:200]}...: nests deeper than {_DEEPEST} levels")
    if isinstance(value, dict):
        for key, one in value.items():
            encodable(key, f"{where}: a key")
            _check_json(one, f"{where}.{key}", depth - 1)
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            _check_json(one, f"{where}[{i}]", depth - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}, which is no number in JSON; write it as a string")
    elif value is not None and not isinstance(value, bool | int | float):
        encodable(value, where)
