"""The ways in which an answer goes wrong: once it costs an attempt, again and again the run.

No wait is made: the clock is moved instead.
"""

import email.utils
import gzip
import json
import logging
import time

import numpy as np
import pytest
from fake_server import Reply
from recorded_answers import IDS, PLP, TARGETS, recorded, score_request

from gkdjax.teachers.server.scheduler import exchange
from gkdjax.utils.errors import GkdjaxError, TeacherUnreachable, WrongAnswer

GOOD = Reply(recorded("vllm-qwen3-tiny-plp")[1])
TEXT = GOOD.payload()
ROWS = json.loads(TEXT)["choices"][0]["prompt_logprobs"]
PAGE = b"<html><h1>502 Bad Gateway</h1></html>"
YEAR = 365 * 86_400
DEADLINE_S, RETRIES = 1000.0, 50


def numbers(written: bytes) -> Reply:
    """The right answer, but for one logprob."""
    right = b'"logprob": ' + json.dumps(ROWS[4]["3389"]["logprob"]).encode()
    assert TEXT.count(right) == 1
    return Reply(TEXT.replace(right, written))


def swapped() -> Reply:
    """The answer to another request."""
    answer = json.loads(TEXT)
    rows = answer["choices"][0]["prompt_logprobs"]
    rows[1:] = rows[:0:-1]
    return Reply(answer)


def said(error, status: int = 200) -> Reply:
    return Reply({"error": error}, status)


def busy(retry_after: str) -> Reply:
    return Reply(PAGE, 429, {"Retry-After": retry_after})


CHUNKED = {"Transfer-Encoding": "chunked"}
LATE = "attempts: 2; the last one: no whole answer within 0.2 s"
# name -> (the answer, the exit code if it comes again and again, what the message has)
FAULTS = {
    "NaN": (numbers(b'"logprob": NaN'), 3, "has the number NaN"),
    "infinite": (numbers(b'"logprob": -Infinity'), 3, "has the number -Infinity"),
    "beyond floats": (numbers(b'"logprob": -1e999'), 3, "beyond all floats"),
    "positive": (numbers(b'"logprob": 0.5'), 3, "a probability above 1"),
    "a string": (numbers(b'"logprob": "-0.5"'), 3, 'is "-0.5", not a number'),
    "no field": (numbers(b'"prob": -0.5'), 3, "has no 'logprob'"),
    "no number": (numbers(b'"logprob": null'), 3, "is null, not a number"),
    "a key twice": (numbers(b'"logprob": -1.0, "logprob": -1.0'), 3, "the key 'logprob' twice"),
    "other ids": (swapped(), 3, r"row 7: answer.choices\[0\].prompt_logprobs.* has no"),
    "no choices": (Reply({"choices": []}), 3, "has 0 entries"),
    "a list": (Reply([1]), 3, r"answer is \[1\], not an object"),
    "gzip": (Reply(gzip.compress(TEXT), headers={"Content-Encoding": "gzip"}), 3, "Encoding gzip"),
    "HTML": (Reply(PAGE), 4, "no JSON: <html><h1>502 Bad"),
    "nothing": (Reply(b""), 4, "no JSON"),
    "204": (Reply(b"", 204), 4, "no JSON"),
    "truncated": (Reply(TEXT[:-9]), 4, 'no JSON: {"id"'),
    "short length": (Reply(TEXT, length=99), 4, 'no JSON: {"id"'),
    "long length": (Reply(TEXT, length=len(TEXT) + 9, cut=len(TEXT)), 4, "IncompleteRead"),
    "chunks that end": (Reply(TEXT, chunked=True, cut=900), 4, "the last one"),
    "no chunk": (Reply(b"-5\r\nabc", headers=CHUNKED, cut=7), 4, "the last one"),
    "cut and reset": (Reply(TEXT, cut=5, reset=True), 4, "reset by peer"),
    "closed": (Reply(silent=True), 4, "without response"),
    "reset": (Reply(silent=True, reset=True), 4, "reset by peer"),
    "silence": (Reply(delay_s=60.0), 4, LATE),
    "headers drip": (Reply(TEXT, drip_headers_s=0.05), 4, LATE),
    "body drips": (Reply(TEXT, drip_body_s=0.05, chunked=True), 4, LATE),
    **{str(s): (Reply(PAGE, s), 4, f"status {s}: <html>") for s in (408, 409, 500, 502, 503, 599)},
    "error": (said("engine died"), 4, "status 200: .*engine died"),
    "error 503": (said({"message": "starting", "code": 503}), 4, "status 200: .*starting"),
    "vLLM's": (Reply({"object": "error", "message": "died"}), 4, "status 200: .*died"),
    "error 400": (said({"message": "too long", "code": 400}), 2, "refused with status 400: too"),
    **{
        f"busy {x}": (busy(x), 4, f"429, Retry-After {x}: <html>")
        for x in ("9", "nan", "inf", "-5")
    },
    **{f"busy {x}": (busy(x), 4, f"429, Retry-After {x}: <html>") for x in (str(YEAR), "9" * 90)},
}
FINAL = {"error 400"}  # asked once
SOUND = {
    "a byte order mark": Reply(b"\xef\xbb\xbf" + TEXT),
    "an early hint": Reply(TEXT, early=b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"),
    "chunks": Reply(TEXT, chunked=True),
}


def ask(transport):
    (answer,) = exchange(transport, PLP, [score_request(IDS)])
    return answer.target_logprob.tolist()


@pytest.fixture(scope="module")
def right() -> list[float]:
    own = [row[str(i)] for row, i in zip(ROWS[1:], IDS[1:], strict=True)]
    return [float(np.float32(own[at]["logprob"])) for at in TARGETS]


@pytest.fixture
def clock(waits, monkeypatch) -> None:
    """Moved by the waits that are not made."""
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + sum(waits))


def limits(name: str) -> tuple[float, float, int]:
    """A timeout that is waited for is short."""
    return (0.2, DEADLINE_S, 1) if FAULTS[name][2] == LATE else (10.0, DEADLINE_S, RETRIES)


@pytest.mark.parametrize("name", FAULTS)
def test_again_and_again_it_ends_the_run(connect, waits, clock, name):
    reply, code, message = FAULTS[name]
    transport, server = connect(reply, limits=limits(name))
    with pytest.raises(GkdjaxError, match=message) as error:
        ask(transport)
    assert error.value.exit_code == code
    if code == 3:
        assert isinstance(error.value, WrongAnswer)
        assert (len(server.requests), waits) == (3, [0.0, 0.0])
    else:
        assert (len(server.requests) == 1) is (name in FINAL)
        assert all(wait >= 0.25 for wait in waits) and sum(waits) < DEADLINE_S


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in FINAL])
def test_once_it_costs_an_attempt(connect, right, name):
    transport, server = connect(FAULTS[name][0], GOOD, limits=limits(name))
    assert ask(transport) == right
    assert (len(server.requests), transport.retries) == (2, 1)


@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound_is_taken(connect, right, name):
    transport, server = connect(SOUND[name])
    assert ask(transport) == ask(transport) == right
    assert (len(server.requests), transport.retries) == (2, 0)


@pytest.mark.parametrize("header", [str(YEAR), "9" * 400, "a date"])
def test_a_server_that_asks_for_a_year_is_asked_once_more_before_the_deadline(
    connect, waits, clock, caplog, header
):
    if header == "a date":
        header = email.utils.formatdate(time.time() + YEAR, usegmt=True)
    transport, _ = connect(busy(header), limits=(10.0, DEADLINE_S, RETRIES))
    with caplog.at_level(logging.WARNING), pytest.raises(TeacherUnreachable, match="Retry-After"):
        ask(transport)
    assert 0.85 * DEADLINE_S < waits[0] <= 0.9 * DEADLINE_S < sum(waits) < DEADLINE_S
    assert f"Retry-After {header[:100]}" in caplog.text
    assert f"trying again in {waits[0]:.1f} s" in caplog.text


@pytest.mark.parametrize(
    "header", ["-5", "nan", "inf", "", "soon", "Sat, 01 Jan 2000 00:00:00 GMT"]
)
def test_a_wait_that_is_none_is_our_own(connect, waits, header):
    assert ask(connect(busy(header), GOOD)[0])
    assert 0.25 <= waits[0] <= 1.0
