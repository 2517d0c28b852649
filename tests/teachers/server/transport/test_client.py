"""What is asked again, for how long, and what is final."""

import concurrent.futures
import datetime
import email.utils
import threading

import pytest
from fake_server import FakeServer, Reply, script

from gkdjax.teachers.server.transport import client
from gkdjax.teachers.server.transport.client import Limits, RepeatedServerError, Transport
from gkdjax.utils.errors import TeacherRefused, TeacherUnreachable, WrongAnswer

GOOD = Reply({"fine": True})
PATIENT = Limits(timeout_s=10.0, deadline_s=1000.0, max_retries=3)
HURRIED = Limits(timeout_s=0.2, deadline_s=1000.0, max_retries=1)
STUBBORN = Limits(timeout_s=0.2, deadline_s=1000.0, max_retries=50)


@pytest.fixture
def sleeps(monkeypatch) -> list[float]:
    """The waits between attempts, none of which is made."""
    waits = []
    monkeypatch.setattr(client, "pause", lambda closed, seconds: waits.append(seconds))
    return waits


@pytest.fixture
def connect(request):
    """Makes transports and closes them."""

    def to(base: str, limits: Limits = PATIENT) -> Transport:
        transport = Transport(base, "", limits, trust_env=False)
        request.addfinalizer(transport.close)
        return transport

    return to


def ask(transport: Transport, **options):
    return transport.post("/v1/completions", {"prompt": [1, 2]}, max_bytes=10_000, **options)


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "/mounted/v1"])
def test_paths_are_appended_whether_or_not_the_address_has_v1(connect, ending):
    with FakeServer(script(GOOD, Reply([1, -9999.0]))) as server:
        transport = connect(server.base + ending)
        assert transport.root == server.base + ("/mounted" if "mounted" in ending else "")
        assert ask(transport) == {"fine": True}
        assert transport.get("/v1/models") == [1, -9999.0]
        asked, got = server.requests
    assert (asked.method, asked.body) == ("POST", {"prompt": [1, 2]})
    assert (got.method, got.body) == ("GET", None)
    assert got.path == transport.root.removeprefix(server.base) + "/v1/models"
    assert asked.headers["Content-Type"] == "application/json"
    assert asked.connection == got.connection  # kept open


@pytest.mark.parametrize(
    "bad",
    [
        *(Reply({"error": "later"}, status=status) for status in (408, 409, 429, 500, 503, 599)),
        Reply(b'{"half": [1, '),
        Reply(b"<html>busy</html>"),
        Reply(b""),
        Reply(b"\xff\xfe"),
        Reply(silent=True),
        Reply(silent=True, reset=True),
        Reply({"fine": False}, cut=5),
        Reply({"fine": False}, cut=5, reset=True),
        Reply({"fine": False}, cut=7, chunked=True),
        Reply({"fine": False}, length=1000, cut=15),
        Reply(b"-5\r\nabc", headers={"Transfer-Encoding": "chunked"}, cut=7),
    ],
)
def test_what_may_go_better_is_asked_again(connect, sleeps, bad):
    with FakeServer(script(bad, bad, GOOD)) as server:
        transport = connect(server.base)
        assert ask(transport) == {"fine": True}
        assert len(server.requests) == 3 and transport.retries == 2
    first, second = sleeps
    assert 0 < first <= 1.0 and 0 < second <= 2.0


@pytest.mark.parametrize(
    "late",
    [
        Reply({"fine": False}, delay_s=30.0),
        Reply({"fine": False}, drip_headers_s=0.05),
        Reply({"fine": False}, drip_body_s=0.05),
        Reply({"fine": False}, drip_body_s=0.05, chunked=True),
    ],
)
def test_an_attempt_ends_at_its_timeout_however_the_answer_trickles(connect, sleeps, late):
    with FakeServer(script(late, GOOD)) as server:
        assert ask(connect(server.base, STUBBORN)) == {"fine": True}
    with FakeServer(script(late)) as server, pytest.raises(TeacherUnreachable) as told:
        ask(connect(server.base, HURRIED))
    assert f"{server.base}: POST /v1/completions" in str(told.value)
    assert "attempts: 2; the last one: no whole answer within 0.2 s" in str(told.value)


def test_a_slow_answer_within_the_timeout_is_taken(connect):
    slow = Reply({"fine": True}, drip_body_s=0.01, chunked=True)
    with FakeServer(script(slow)) as server:
        assert ask(connect(server.base)) == {"fine": True}


def test_a_server_that_is_away_is_waited_for(connect, monkeypatch):
    with FakeServer(script(GOOD)) as server:
        server.stop()
        transport = connect(server.base)
        with pytest.raises(TeacherUnreachable, match="Connection refused"):
            ask(connect(server.base, Limits(10.0, 0.1, 3)))
        monkeypatch.setattr(client, "pause", lambda closed, seconds: server.start())
        assert ask(transport) == {"fine": True}
        assert transport.retries == 1


def test_attempts_end_with_the_number_of_retries_and_tell_the_last_reason(connect, sleeps):
    page = Reply(b"over\r\nloaded" + b"x" * 400, status=503)
    with FakeServer(script(page)) as server, pytest.raises(TeacherUnreachable) as told:
        ask(connect(server.base))
    assert len(server.requests) == 4 == len(sleeps) + 1
    reason = "attempts: 4; the last one: status 503: over loaded" + "x" * 289 + "..."
    assert str(told.value).endswith(reason)


def test_no_attempt_begins_after_the_deadline(connect, sleeps):
    busy = Reply(status=429, headers={"Retry-After": "30"})
    with FakeServer(script(busy)) as server, pytest.raises(TeacherUnreachable, match="429"):
        ask(connect(server.base, Limits(10.0, 25.0, 3)))
    assert len(server.requests) == 1 and not sleeps


def test_the_last_attempt_is_cut_at_the_deadline(connect):
    with FakeServer(script(Reply(delay_s=60.0))) as server, pytest.raises(TeacherUnreachable):
        ask(connect(server.base, Limits(timeout_s=60.0, deadline_s=0.2, max_retries=3)))


@pytest.mark.parametrize(("header", "seconds"), [("17", 17.0), ("2.5", 2.5), ("9" * 30, 60.0)])
def test_the_server_says_how_long_to_wait(connect, sleeps, header, seconds):
    busy = Reply(status=429, headers={"Retry-After": header})
    with FakeServer(script(busy, GOOD)) as server:
        ask(connect(server.base))
    assert sleeps == [seconds]


def test_retry_after_may_be_a_date_or_nonsense():
    now = datetime.datetime.now(datetime.UTC)
    soon, later, past = (
        email.utils.format_datetime(now + datetime.timedelta(seconds=s), usegmt=True)
        for s in (50, 36_000, -50)
    )
    assert 30 < client.retry_after(soon) <= 50
    assert client.retry_after(later) == 60.0
    for header in (past, None, "", "soon", "-5", "nan", "inf", "Mon, 99 Abc 2026 99:99:99 GMT"):
        assert client.retry_after(header) == 0.0


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        *((status, "") for status in (400, 405, 413, 418, 422, 501)),
        *((status, "; see config.teacher.api_key_env") for status in (401, 403)),
        (404, "; see config.teacher.api_base and config.teacher.api_model"),
    ],
)
def test_a_refusal_is_final_and_quoted(connect, sleeps, status, hint):
    no = Reply({"error": {"message": "no\nsuch thing", "code": 7}}, status=status)
    with FakeServer(script(no)) as server, pytest.raises(TeacherRefused) as told:
        ask(connect(server.base))
    assert len(server.requests) == 1
    said = f"{server.base}: POST /v1/completions was refused with status {status}: no such thing"
    assert str(told.value) == said + hint


@pytest.mark.parametrize(
    ("body", "quoted"),
    [
        ({"message": "a"}, "400: a"),
        ({"error": "b"}, "400: b"),
        ({"detail": [{"loc": ["body"]}]}, '400: [{"loc": ["body"]}]'),
        ({"other": 1}, '400: {"other": 1}'),
        (b"plain", "400: plain"),
        (b"\xff\x00\x1b[2Ja", "400: \ufffd [2Ja"),
        (b"[" * 50_000, "400: [[["),
        (b"y" * 600, "400: " + "y" * 500 + "..."),
    ],
)
def test_the_sentence_for_people_is_found(connect, body, quoted):
    no = Reply(body, status=400)
    with FakeServer(script(no)) as server, pytest.raises(TeacherRefused) as told:
        ask(connect(server.base))
    assert quoted in str(told.value) and len(str(told.value)) < 700


def test_the_same_server_error_twice_lets_the_caller_split(connect, sleeps):
    same, other = Reply({"e": "one"}, status=500), Reply({"e": "other"}, status=500)
    numbered = [f"one request_id=req-{n}f0-beef at 13:{n}7:02" for n in range(2)]
    for replies in ([same, same], [Reply({"e": text}, status=500) for text in numbered]):
        with FakeServer(script(*replies, GOOD)) as server:
            with pytest.raises(RepeatedServerError, match="attempts: 2; the last one: status 500"):
                ask(connect(server.base), most_same=2)
            assert len(server.requests) == 2
    for replies in ([same, other, same], [same, Reply(silent=True), same], [Reply(status=429)] * 2):
        with FakeServer(script(*replies, GOOD)) as server:
            assert ask(connect(server.base), most_same=2) == {"fine": True}
    with FakeServer(script(same, same, GOOD)) as server:
        assert ask(connect(server.base)) == {"fine": True}
    with FakeServer(script(other, same, same, GOOD)) as server:
        assert ask(connect(server.base), most_same=3) == {"fine": True}


def test_what_is_no_json_to_the_end_is_a_wrong_answer(connect, sleeps):
    with FakeServer(script(Reply(b"<html>" + b"z" * 300))) as server:
        with pytest.raises(WrongAnswer) as told:
            ask(connect(server.base))
        assert len(server.requests) == 4
    assert "no JSON: <html>zzz" in str(told.value) and "z" * 200 not in str(told.value)


def test_what_the_caller_is_handling_already_is_not_taken_for_the_reason(connect, sleeps):
    with FakeServer(script(GOOD)) as server:
        transport = connect(server.base)
    try:
        raise KeyError("mine")
    except KeyError:
        with pytest.raises(TeacherUnreachable, match="Connection refused"):
            ask(transport)


def test_eight_threads_each_get_their_own_answers(connect, sleeps):
    def handler(request):
        bad = request.number % 5 == 0
        return Reply(status=503) if bad else Reply({"echo": request.body["n"]})

    with FakeServer(handler) as server, concurrent.futures.ThreadPoolExecutor(8) as threads:
        transport = connect(server.base, Limits(10.0, 100.0, 50))
        said = list(
            threads.map(lambda n: transport.post("/v1/x", {"n": n}, max_bytes=99), range(200))
        )
        assert said == [{"echo": n} for n in range(200)]
        assert len(server.requests) == 200 + transport.retries
        assert len({request.connection for request in server.requests}) <= 8


def test_closing_wakes_whoever_waits(connect, monkeypatch):
    waiting, really_pause = threading.Event(), client.pause

    def pause(closed, seconds):
        waiting.set()
        really_pause(closed, seconds)

    monkeypatch.setattr(client, "pause", pause)
    busy = Reply(status=429, headers={"Retry-After": "60"})
    with FakeServer(script(busy)) as server, concurrent.futures.ThreadPoolExecutor(1) as threads:
        transport = connect(server.base)
        answer = threads.submit(ask, transport)
        assert waiting.wait(20)
        transport.close()
        with pytest.raises(TeacherUnreachable, match="the transport is closed"):
            answer.result(timeout=20)
        assert len(server.requests) == 1
