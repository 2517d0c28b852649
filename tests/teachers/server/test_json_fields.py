import math

import pytest

from gkdjax.teachers.server import json_fields
from gkdjax.teachers.server.json_fields import JsonField, opened
from gkdjax.utils.errors import WrongAnswer


@pytest.mark.parametrize(
    "body, message",
    [
        (b'{"a": NaN}', "number NaN"),
        (b'{"a": [Infinity]}', "number Infinity"),
        (b'{"a": -Infinity}', "number -Infinity"),
        (b'{"a": -1e999}', "beyond all floats, -1e999"),
        (b'[{"a": 1, "b": 2, "a": 1}]', "the key 'a' twice"),
        (b'"text"', "a single str"),
        (b"null", "a single NoneType"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    ],
)
def test_what_only_python_takes_for_json_is_refused(body, message):
    with pytest.raises(WrongAnswer, match=message):
        json_fields.parse(body, WrongAnswer)


@pytest.mark.parametrize(
    "body", [b'{"half": [1, ', b"<html>", b"", b"\xff\xfe", b"9" * 5000], ids=range(5)
)
def test_what_does_not_parse(body):
    with pytest.raises(json_fields.NotJson):
        json_fields.parse(body, WrongAnswer)


ROOT = {"a": {"b c": [1, 2.5, "x", None, True, 3.0, 10**400, math.nan]}}


def field(place: int) -> JsonField:
    return opened(ROOT, "row 7")["a"]["b c"].entries()[place]


@pytest.mark.parametrize(
    ("place", "read", "why"),
    [
        (2, JsonField.whole, '"x", not a whole number'),
        (4, JsonField.whole, "true, not a whole number"),
        (5, JsonField.whole, "3.0, not a whole number"),
        (3, JsonField.whole, "null, not a whole number"),
        (2, JsonField.number, '"x", not a number'),
        (4, JsonField.number, "true, not a number"),
        (3, JsonField.number, "null, not a number"),
        (6, JsonField.number, "not a number of that size"),
        (0, JsonField.text, "1, not a string"),
        (0, JsonField.entries, "1, not a list"),
        (3, JsonField.items, "null, not an object"),
        (0, JsonField.check_null, "1, not null"),
    ],
)
def test_a_field_of_another_type_is_named(place, read, why):
    with pytest.raises(WrongAnswer) as caught:
        read(field(place))
    assert str(caught.value).startswith(f"row 7: answer.a['b c'][{place}] is ")
    assert str(caught.value).endswith(why)


def test_fields_that_are_there_or_missing():
    root = opened(ROOT, "row 7")
    assert (field(0).whole(), field(1).number(), field(2).text()) == (1, 2.5, "x")
    assert math.isnan(field(7).number())
    assert root.find("a", "b c").value == ROOT["a"]["b c"]
    assert root.find("a", "none") is root.find("none", "a") is None
    with pytest.raises(WrongAnswer, match=r"row 7: answer\.a has no 'c', only \[\"b c\"\]"):
        root["a"]["c"]
    with pytest.raises(WrongAnswer, match=r"has 8 entries, not 7"):
        root["a"]["b c"].entries(7)
    with pytest.raises(WrongAnswer, match=r"row 7: answer is \[\], not an object"):
        opened([], "row 7")
