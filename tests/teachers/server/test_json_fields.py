import pytest

from gkdjax.teachers.server import json_fields
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
