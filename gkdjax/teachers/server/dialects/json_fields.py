"""Typed access to the fields of a JSON answer, with errors that name the field.

A server may send anything: whatever it is, it is either what the caller asks for or a
`WrongAnswer`, and never another exception.
"""

import json
from typing import Any

from gkdjax.utils.errors import WrongAnswer

_MOST_SHOWN = 120  # characters of a wrong value that an error shows


class JsonField:
    """A value in an answer, and the way to it; the way is only put into words for an error."""

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
        found = self._object()
        if key not in found:
            raise self.wrong(f"has no {key!r}, only {shown(sorted(found))}")
        return JsonField(found[key], key, self)

    def find(self, key: str) -> "JsonField | None":
        """A field that may be missing or null; None if it is."""
        found = self._object().get(key)
        return None if found is None else JsonField(found, key, self)

    def items(self) -> list[tuple[str, "JsonField"]]:
        """Of an object."""
        return [(key, JsonField(value, key, self)) for key, value in self._object().items()]

    def entries(self, *counts: int) -> list["JsonField"]:
        """Of a list, which has one of `counts` entries if any are given."""
        if not isinstance(self.value, list):
            raise self._not("a list")
        if counts and len(self.value) not in counts:
            wanted = " or ".join(map(str, counts))
            raise self.wrong(f"has {len(self.value)} entries, not {wanted}")
        return [JsonField(value, i, self) for i, value in enumerate(self.value)]

    def text(self) -> str:
        """A string."""
        if not isinstance(self.value, str):
            raise self._not("a string")
        return self.value

    def whole(self) -> int:
        """A whole number; 3.0, "3" and true are none."""
        if type(self.value) is not int:
            raise self._not("a whole number")
        return self.value

    def number(self) -> float:
        """A number; it may be infinite or NaN."""
        if type(self.value) not in (int, float):
            raise self._not("a number")
        try:
            return float(self.value)
        except OverflowError:
            raise self._not("a number of that size") from None

    def check_null(self) -> None:
        """There must be nothing here."""
        if self.value is not None:
            raise self._not("null")

    def _object(self) -> dict:
        if not isinstance(self.value, dict):
            raise self._not("an object")
        return self.value

    def _not(self, what: str) -> WrongAnswer:
        return self.wrong(f"is {shown(self.value)}, not {what}")


def opened(answer: Any, name: str) -> JsonField:
    """The answer to a request about the row `name`.

    Raises:
      WrongAnswer: it is an error, though the server's status said otherwise.
    """
    root = JsonField(answer, f"{name}: answer")
    if not isinstance(answer, dict):
        raise root.wrong(f"is {shown(answer)}, not an object")
    error = answer if answer.get("object") == "error" else answer.get("error")
    if error is not None:
        raise root.wrong(f"is an error: {shown(error)}")
    return root


def shown(value: Any) -> str:
    """A value as an error shows it: on one line, in ASCII, and not long."""
    text = json.dumps(value)
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."
