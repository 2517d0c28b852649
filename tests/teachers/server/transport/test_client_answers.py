"""Answers that are refused although they have arrived, and at once."""

import gzip

import pytest
from fake_server import FakeServer, Reply, script

from gkdjax.teachers.server import json_fields
from gkdjax.teachers.server.transport.client import Limits, Transport
from gkdjax.utils.errors import TeacherRefused, WrongAnswer


def answered(reply: Reply, max_bytes: int = 1000):
    with FakeServer(script(reply)) as server:
        transport = Transport(server.base, "", Limits(10.0, 20.0, 3), trust_env=False)
        try:
            return transport.post("/v1/x", {}, max_bytes=max_bytes)
        finally:
            transport.close()
            (request,) = server.requests  # it is not asked again
            assert request.headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("body", "told"),
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
def test_what_only_python_takes_for_json_is_refused(body, told):
    with pytest.raises(WrongAnswer, match=told) as error:
        answered(Reply(body), max_bytes=10**6)
    assert "POST /v1/x: the answer" in str(error.value)


def test_what_is_json_is_taken():
    sound = {"a": [-9999.0, -0.0, 1e-300, 10**400, "ä", "\U0001f600"], "b": {"a": None}}
    assert answered(Reply(sound)) == sound
    with pytest.raises(json_fields.NotJson):
        json_fields.parse(b"9" * 5000, WrongAnswer)  # more digits than Python converts


@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_has_at_most_so_many_bytes(chunked):
    most = len(b'"%b"' % (b"x" * 500)) + 2
    assert answered(Reply(["x" * 500], chunked=chunked), most) == ["x" * 500]
    with pytest.raises(WrongAnswer, match=f"more than {most} bytes"):
        answered(Reply(["x" * 501], chunked=chunked), most)


def test_an_endless_answer_is_left_at_the_limit():
    endless = Reply(b"[" + b" " * 10**6, length=10**15)
    with pytest.raises(WrongAnswer, match="more than 1000 bytes"):
        answered(endless)


def test_nothing_is_unpacked():
    packed = {"Content-Encoding": "gzip"}
    bomb = Reply(gzip.compress(b"[" + b" " * 10**7), headers=packed)
    with pytest.raises(WrongAnswer, match="Content-Encoding gzip"):
        answered(bomb, 10**5)
    with pytest.raises(TeacherRefused, match="status 400: <gzip>"):
        answered(Reply(b"which would not unpack", status=400, headers=packed))
    assert answered(Reply([1], headers={"Content-Encoding": "identity"})) == [1]
