"""Checks of the values that a row, a message or a prefix is made of.

Each error starts with the place that the caller names, as "train.jsonl:17: prompt".
"""

from gkdjax.errors import UserError
from gkdjax.types import Message

_SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
_SPEAKERS |= {role: role for role in ("system", "user", "assistant")}


def text(value: object, where: str) -> str:
    """`value` as it is, if it is text that a tokenizer can read and a model can learn from.

    Line breaks of any kind and emoji are fine.

    Raises:
      UserError: no string, nothing but white space, a NUL, or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise UserError(f"{where} must be a string, not {kind(value)}")
    if not value.replace("\ufeff", "").strip():  # a byte order mark is none to Python
        raise UserError(f"{where} is {'nothing but white space' if value else 'empty'}")
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


def messages(listed: object, where: str, unread: set[str]) -> tuple[Message, ...]:
    """A list of {"role", "content"}, or of ShareGPT's {"from", "value"} -> Messages.

    Args:
      listed: what the data have.
      where: it stands.
      unread: takes in the names of fields that nothing reads.

    Raises:
      UserError: no list, or a message without both fields, or with both forms of them.
    """
    if not isinstance(listed, list | tuple):
        raise UserError(f"{where} must be a list of messages, not {kind(listed)}")
    return tuple(_message(item, f"{where}[{i}]", unread) for i, item in enumerate(listed))


def kind(value: object) -> str:
    """A value's type, in JSON's words where JSON has it."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    kinds |= {int: "a number", float: "a number", type(None): "null"}
    return kinds[type(value)] if type(value) in kinds else type(value).__name__


def _message(message: object, where: str, unread: set[str]) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"{where}: must be {{'role': ..., 'content': ...}}, not {kind(message)}")
    # Tables have every field in every row: null where a row does not have it.
    given = [field for field, value in message.items() if value is not None]
    forms = [form for form in (("role", "content"), ("from", "value")) if {*form} & {*given}]
    if len(forms) > 1:
        found = " and ".join(repr(f) for form in forms for f in form if f in given)
        raise UserError(f"{where}: has {found}; keep 'role' and 'content', or 'from' and 'value'")
    form = forms[0] if forms else ("role", "content")
    for field in form:
        if field not in message:
            raise UserError(f"{where}: has no {field!r}; there is {sorted(map(str, message))}")
    unread.update(f"messages[].{field}" for field in given if field not in form)
    role, content = (text(message[field], f"{where}: {field}") for field in form)
    if form[0] == "from":
        if role not in _SPEAKERS:
            raise UserError(
                f"{where}: from = {role!r} is nobody known: it is one of {', '.join(_SPEAKERS)};"
                " write other roles as {'role': ..., 'content': ...}"
            )
        role = _SPEAKERS[role]
    return Message(role, content)
