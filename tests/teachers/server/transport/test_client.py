"""What is asked again, for how long, and what is final."""

import concurrent.futures
import email.utils
import gzip
import threading
import time

import pytest
from fake_server import Reply

from gkdjax.teachers.server.transport import client
from gkdjax.teachers.server.transport.client import Limits, RepeatedServerError, Transport
from gkdjax.utils.errors import TeacherRefused, TeacherUnreachable, WrongAnswer

GOOD = Reply({"fine": True})
HURRIED = (0.2, 1000.0, 1)


def ask(transport: Transport, **options):
    return transport.post("/v1/completions", {"prompt": [1, 2]}, max_bytes=1000, **options)


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "/mounted/v1"])
def test_paths_are_appended_whether_or_not_the_address_has_v1(connect, ending):
    transport, server = connect(GOOD, Reply([1, -9999.0]), path=ending)
    root = server.base + ("/mounted" if "mounted" in ending else "")
    assert (ask(transport), transport.get("/v1/models")) == ({"fine": True}, [1, -9999.0])
    asked, got = server.requests
    assert (asked.method, asked.body) == ("POST", {"prompt": [1, 2]})
    assert (got.method, got.body) == ("GET", None)
    assert transport.root == root and got.path == root.removeprefix(server.base) + "/v1/models"
    assert asked.headers["Content-Type"] == "application/json"
    assert asked.headers["Accept-Encoding"] == "identity"
    assert asked.connection == got.connection  # kept open


def test_a_slow_answer_within_the_timeout_is_taken(connect):
    slow = Reply({"fine": True}, drip_body_s=0.01, chunked=True)
    assert ask(connect(slow)[0]) == {"fine": True}


def test_a_server_that_is_away_is_waited_for(connect, monkeypatch):
    transport, server = connect(GOOD)
    server.stop()
    impatient = Transport(server.base, "", Limits(10.0, 0.1, 3), trust_env=False)
    try:
        raise KeyError("an error that the caller handles is not taken for the reason")
    except KeyError:
        with pytest.raises(TeacherUnreachable, match="Connection refused"):
            ask(impatient)
    monkeypatch.setattr(client, "pause", lambda closed, seconds: server.start())
    assert ask(transport) == {"fine": True} and transport.retries == 1


PAGE = Reply(b"over\r\nloaded" + b"x" * 400, status=503)


@pytest.mark.parametrize(
    "reply, limits, message, attempts",
    [
        (PAGE, (10.0, 1000.0, 3), r"attempts: 4; .*over loadedx{289}\.\.\.$", 4),
        (Reply(b"<html>" + b"z" * 300), (10.0, 1000.0, 1), "no JSON: <html>z{194}\\.", 2),
        (PAGE, (10.0, 0.2, 3), "attempts: 1; ", 1),  # none begins after the deadline,
        (Reply(delay_s=60.0), (60.0, 0.2, 3), "no whole answer", 1),  # the last is cut there
    ],
)
def test_attempts_end(connect, reply, limits, message, attempts):
    transport, server = connect(reply, limits=limits)
    with pytest.raises(TeacherUnreachable, match=message):
        ask(transport)
    assert len(server.requests) == attempts


@pytest.mark.parametrize(
    "header, least, most", [("17", 17.0, 17.0), ("2.5", 2.5, 2.5), ("", 100.0, 300.0)]
)
def test_the_server_says_how_long_to_wait(connect, waits, header, least, most):
    header = header or email.utils.formatdate(time.time() + most, usegmt=True)
    ask(connect(Reply(status=429, headers={"Retry-After": header}), GOOD)[0])
    assert least <= waits[0] <= most


NO = {"error": {"message": "no\nsuch thing", "code": 7}}
GZIP = {"Content-Encoding": "gzip"}


@pytest.mark.parametrize(
    "reply, message",
    [
        *((Reply(NO, s), f"with status {s}: no such thing$") for s in (400, 405, 418, 422, 501)),
        *((Reply(NO, s), "thing; see config.teacher.api_key_env$") for s in (401, 403)),
        (Reply(NO, 404), "see config.teacher.api_base and config.teacher.api_model$"),
        (Reply({"message": "a"}, 400), "400: a$"),
        (Reply({"error": "b"}, 400), "400: b$"),
        (Reply({"detail": [{"loc": ["body"]}]}, 400), r'400: \[{"loc": \["body"\]}\]$'),
        (Reply({"other": 1}, 400), '400: {"other": 1}$'),
        (Reply(b"\xff\x00\x1b[2Ja", 400), "400: \ufffd \\[2Ja$"),
        (Reply(b"[" * 50_000, 400), r"400: \[{500}\.\.\.$"),
        (Reply(b"which would not unpack", 400, headers=GZIP), "400: <gzip>$"),
        (
            Reply(b'{"a": NaN}'),
            "POST /v1/completions got .*attempts: 3; .*the answer has the number NaN",
        ),
        (Reply(["x" * 1000]), "more than 1000 bytes"),
        (Reply(["x" * 1000], chunked=True), "more than 1000 bytes"),
        (Reply(b"[" + b" " * 10**6, length=10**15), "more than 1000 bytes"),
        (Reply(gzip.compress(b"[" + b" " * 10**6), headers=GZIP), "Content-Encoding gzip"),
    ],
)
def test_what_is_final_is_quoted(connect, reply, message):
    transport, server = connect(reply)
    with pytest.raises(WrongAnswer if reply.status == 200 else TeacherRefused, match=message):
        ask(transport)
    assert len(server.requests) == (3 if reply.status == 200 else 1)


@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_of_as_many_bytes_as_may_be_is_taken(connect, chunked):
    sound = {"a": [-9999.0, -0.0, 1e-300, 10**400, "ä", "\U0001f600"], "b": {"a": None}}
    sound["c"] = "x" * (1000 - len(Reply(sound | {"c": ""}).payload()))
    identity = {"Content-Encoding": "identity"}
    assert ask(connect(Reply(sound, headers=identity, chunked=chunked))[0]) == sound


def error_500(text: str) -> Reply:
    return Reply({"e": text}, status=500)


@pytest.mark.parametrize(
    "replies, most_same, ends",
    [
        ([error_500("one"), error_500("one")], 2, True),
        ([error_500(f"request_id=req-{n}f0-beef at 13:{n}7:02") for n in range(2)], 2, True),
        ([error_500("one"), error_500("other"), error_500("one")], 2, False),
        ([error_500("one"), Reply(silent=True), error_500("one")], 2, False),
        ([Reply(status=429), Reply(status=429)], 2, False),
        ([error_500("one"), error_500("one")], 0, False),
        ([error_500("other"), error_500("one"), error_500("one")], 3, False),
    ],
)
def test_the_same_server_error_again_ends_it_if_it_is_to(connect, replies, most_same, ends):
    transport, server = connect(*replies, GOOD)
    if ends:
        with pytest.raises(RepeatedServerError, match="attempts: 2; the last one: status 500"):
            ask(transport, most_same=most_same)
        assert len(server.requests) == 2
    else:
        assert ask(transport, most_same=most_same) == {"fine": True}


def test_eight_threads_each_get_their_own_answers(connect):
    def handler(request):
        bad = request.number % 5 == 0
        return Reply(status=503) if bad else Reply({"echo": request.body["n"]})

    transport, server = connect(GOOD, limits=(10.0, 100.0, 50))
    server.handler = handler
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        answers = threads.map(lambda n: transport.post("/v1/x", {"n": n}, max_bytes=99), range(200))
        assert list(answers) == [{"echo": n} for n in range(200)]
    assert len(server.requests) == 200 + transport.retries
    assert len({request.connection for request in server.requests}) <= 8


def test_closing_wakes_whoever_waits(connect, monkeypatch):
    waiting = threading.Event()

    def pause(closed, seconds):
        waiting.set()
        assert closed.wait(20)

    monkeypatch.setattr(client, "pause", pause)
    transport, server = connect(Reply(status=429))
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        answer = threads.submit(ask, transport)
        assert waiting.wait(20)
        transport.close()
        with pytest.raises(TeacherUnreachable, match="the transport is closed"):
            answer.result(timeout=20)
    assert len(server.requests) == 1
