"""A server's JSON: a strict parser, and typed access to the fields.

A server may send anything: a field is what the caller asks for, or reading it raises a
`WrongAnswer` that names it, and never another exception.
"""

import json
import math
from collections.abc import Callable
from typing import Any

from gkdjax.utils.errors import WrongAnswer

_MOST_SHOWN = 120  # characters of a wrong value that an error shows


class NotJson(ValueError):
    """It is cut short, or something else, such as a proxy's error page."""


def parse(body: bytes, wrong: Callable[[str], WrongAnswer]) -> dict | list:
    """The object or list in `body`, which is UTF-8, perhaps with a byte order mark.

    Raises:
      NotJson: it does not parse.
      WrongAnswer: a number is not finite, an object has a key twice (Python silently takes the
        last one), it is nested too deeply, or neither object nor list. `wrong` makes the error
        from a description such as "has the number NaN".
    """

    def refuse_constant(name: str) -> float:
        raise wrong(f"has the number {name}, which is no JSON")

    def finite(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise wrong(f"has a number beyond all floats, {digits[:40]}")
        return number

    def distinct(pairs: list[tuple]) -> dict:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise wrong(f"has an object with the key {twice[:80]!r} twice")
        return result

    hooks = {
        "parse_constant": refuse_constant,
        "parse_float": finite,
        "object_pairs_hook": distinct,
    }
    try:
        parsed = json.loads(body.decode("utf-8-sig"), **hooks)
    except RecursionError:
        raise wrong("is nested too deeply") from None
    except ValueError as error:
        raise NotJson(str(error)) from None
    if not isinstance(parsed, dict | list):
        raise wrong(f"is a single {type(parsed).__name__}, not an object")
    return parsed


class JsonField:
    """A value in an answer, and the path to it, which is spelled out for errors only."""

    __slots__ = ("_name", "_parent", "value")

    def __init__(self, value: Any, name: str | int, parent: "JsonField | None" = None):
        self.value, self._name, self._parent = value, name, parent

    @property
    def path(self) -> str:
        """As "train.jsonl:17: answer.choices[0].index"."""
        if self._parent is None:
            return str(self._name)
        if isinstance(self._name, str) and self._name.isidentifier():
            return f"{self._parent.path}.{self._name}"
        return f"{self._parent.path}[{self._name!r}]"

    def wrong(self, why: str) -> WrongAnswer:
        """An error about this field."""
        return WrongAnswer(f"{self.path} {why}")

    def __getitem__(self, key: str) -> "JsonField":
        """A field that has to be there; it may be null."""
        found = self._of_type(dict, "an object")
        if key not in found:
            raise self.wrong(f"has no {key!r}, only {shown(sorted(found))}")
        return JsonField(found[key], key, self)

    def find(self, *keys: str) -> "JsonField | None":
        """The field at the end of the keys; None where one of them is missing or null."""
        field = self
        for key in keys:
            value = field._of_type(dict, "an object").get(key)
            if value is None:
                return None
            field = JsonField(value, key, field)
        return field

    def items(self) -> list[tuple[str, "JsonField"]]:
        """The fields of an object."""
        found = self._of_type(dict, "an object")
        return [(key, JsonField(value, key, self)) for key, value in found.items()]

    def entries(self, count: int | None = None) -> list["JsonField"]:
        """The entries of a list, which must have `count` of them if one is given."""
        found = self._of_type(list, "a list")
        if count is not None and len(found) != count:
            raise self.wrong(f"has {len(found)} entries, not {count}")
        return [JsonField(value, i, self) for i, value in enumerate(found)]

    def text(self) -> str:
        return self._of_type(str, "a string")

    def whole(self) -> int:
        """A whole number; 3.0, "3" and true are none."""
        return self._of_type(int, "a whole number")

    def number(self) -> float:
        """A number; it may be infinite or NaN."""
        if type(self.value) not in (int, float):
            raise self._not("a number")
        try:
            return float(self.value)
        except OverflowError:
            raise self._not("a number of that size") from None

    def check_null(self) -> None:
        if self.value is not None:
            raise self._not("null")

    def _of_type(self, wanted: type, name: str) -> Any:
        if type(self.value) is not wanted:
            raise self._not(name)
        return self.value

    def _not(self, name: str) -> WrongAnswer:
        return self.wrong(f"is {shown(self.value)}, not {name}")


def opened(answer: Any, name: str) -> JsonField:
    """The answer to a request about the row `name`; WrongAnswer unless it is an object."""
    root = JsonField(answer, f"{name}: answer")
    root._of_type(dict, "an object")
    return root


def error_status(answer: dict | list) -> int | None:
    """The HTTP status that an error in an answer states, 500 if it states none; None without one.

    Servers and proxies send errors with status 200, too.
    """
    if not isinstance(answer, dict):
        return None
    error = answer if answer.get("object") == "error" else answer.get("error")
    if error is None:
        return None
    code = error.get("code") if isinstance(error, dict) else None
    return code if type(code) is int and 400 <= code < 600 else 500


def shown(value: Any) -> str:
    """A value as an error shows it: on one line, in ASCII, and not long."""
    text = json.dumps(value)
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."
