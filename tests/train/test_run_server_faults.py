"""A server that fails in the middle of a run: it ends as undisturbed, or is saved and says why.

One request at a time scores the rows of one step, so that a fault's number is its step.
"""

import contextlib
import math
import pathlib
import re
import traceback

import pytest
from fake_server import FakeServer, Reply
from server_runs import READ_IN_TURN, Failing, answers_in, config_for, restarting
from small_runs import losses_hex, metrics

import gkdjax
from gkdjax import config
from gkdjax.rollout import teacher as rollout_teacher
from gkdjax.teachers.server.transport import client
from gkdjax.train import setup
from gkdjax.utils.errors import GkdjaxError, TeacherRefused, TeacherUnreachable, WrongAnswer

KEY = "canary-4711-sesame-4711"


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Short ones between attempts."""
    monkeypatch.setattr(client, "pause", lambda closed, seconds: closed.wait(0.01))


@pytest.fixture(scope="module")
def undisturbed(student, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    with failing() as (server, _):
        gkdjax.run(config_for(student, server.base, **READ_IN_TURN), workdir)
    return workdir


@contextlib.contextmanager
def failing():
    teacher = Failing()
    with FakeServer(teacher) as server:
        yield server, teacher


def weights(workdir: pathlib.Path) -> bytes:
    return (workdir / "merged" / "model.safetensors").read_bytes()


def assert_equal(workdir: pathlib.Path, undisturbed: pathlib.Path) -> None:
    assert losses_hex(workdir) == losses_hex(undisturbed)
    assert weights(workdir) == weights(undisturbed)
    assert answers_in(workdir / "answers.sqlite") == answers_in(undisturbed / "answers.sqlite")


def assert_nothing_wrong_is_kept(workdir: pathlib.Path, undisturbed: pathlib.Path) -> None:
    right = answers_in(undisturbed / "answers.sqlite")
    assert answers_in(workdir / "answers.sqlite").items() <= right.items()


def test_what_passes_leaves_no_trace_in_the_run(student, undisturbed, tmp_path):
    with failing() as (server, teacher):
        faults = (
            restarting(server),
            lambda request: Reply(status=503, headers={"Retry-After": "9"}),
            lambda request: Reply(b'{"choices": ['),
            lambda request: Reply({"choices": []}, cut=5, reset=True),
            lambda request: Reply(silent=True),
            restarting(server),
        )
        teacher.faults = {step: teacher.once(fault) for step, fault in enumerate(faults)}
        c = config_for(student, server.base, **READ_IN_TURN, teacher__max_retries=1000)
        results = gkdjax.run(c, tmp_path)
    assert results["teacher"]["retries"] >= 6
    assert_equal(tmp_path, undisturbed)


def test_a_row_that_the_server_trips_over_is_found_and_the_run_goes_on(
    student, undisturbed, tmp_path
):
    bad = []

    with failing() as (server, teacher):

        def trip(request):
            bad[:] = bad or [request.body["prompt"][2]]
            if bad[0] in request.body["prompt"]:
                return Reply({"error": "index out of range"}, status=500)
            return teacher.well(request)

        teacher.faults = {3: trip}
        c = config_for(student, server.base, **READ_IN_TURN, teacher__max_retries=2)
        with pytest.raises(
            TeacherUnreachable, match=r"data.train:\d+: .*index out of range"
        ) as caught:
            gkdjax.run(c, tmp_path)
        assert caught.value.exit_code == 4
        assert "got to step 3 of 6, and is saved" in str(caught.value)
        assert len(answers_in(tmp_path / "answers.sqlite")) >= 3 + 3 * 4 + 2
        teacher.faults = {}
        gkdjax.run(c, tmp_path)
    assert_equal(tmp_path, undisturbed)


def test_who_stays_away_is_waited_for_and_then_the_same_call_goes_on(
    student, undisturbed, tmp_path
):
    with failing() as (server, teacher):
        teacher.faults = {5: lambda request: Reply(status=503)}
        c = config_for(student, server.base, **READ_IN_TURN, teacher__max_retries=2)
        c.checkpoint.every_steps = 100
        with pytest.raises(TeacherUnreachable, match="got to step 5 of 6, and is saved"):
            gkdjax.run(c, tmp_path)
        assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2, 3, 4]
        assert (tmp_path / "checkpoints" / "5").is_dir()
        teacher.faults = {}
        before = teacher.answered
        gkdjax.run(c, tmp_path)
        assert teacher.answered - before == 33 + 4  # the preflight's, and the rows of one step
    assert_equal(tmp_path, undisturbed)


def first_row(reply: Reply) -> list:
    return reply.body["choices"][0]["prompt_logprobs"]


def last_entry(reply: Reply) -> dict:
    return first_row(reply)[-1]


def spoil_positive(reply):
    next(iter(last_entry(reply).values()))["logprob"] = 0.5


def spoil_nan(reply):
    next(iter(last_entry(reply).values()))["logprob"] = math.nan


def spoil_length(reply):
    first_row(reply).pop()


def spoil_null(reply):
    first_row(reply)[-1] = None


def spoil_positions(reply):
    row = first_row(reply)
    row[1:] = row[2:] + row[1:2]


def spoil_vocabulary(reply):
    row = last_entry(reply)
    best = max(row, key=lambda i: row[i]["logprob"])
    first = min(row, key=lambda i: i == best)  # any other stays
    del row[first]
    row["5000"] = {"logprob": -1.0}


def spoil_count(reply):
    row = last_entry(reply)
    for i in list(row)[2:]:
        del row[i]


def spoil_rows(reply):
    reply.body["choices"].pop()


SPOILED = [
    *(spoil_positive, spoil_nan, spoil_length, spoil_null),
    *(spoil_positions, spoil_vocabulary, spoil_count, spoil_rows),
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_wrong_answer_is_neither_used_nor_kept(student, undisturbed, tmp_path, spoil):
    with failing() as (server, teacher), contextlib.ExitStack() as connections:
        c = config.parse(config_for(student, server.base, **READ_IN_TURN))
        rows = setup.read(c, tmp_path, None, connections)
        how = rows.teacher, tmp_path, rows.vocab_size
        feed = rollout_teacher.prepare(c, "train", rows.dataset, *how)
        rows.teacher.targets(feed.batch(0)[0])
        teacher.faults = {1: spoiled(teacher, spoil)}
        with pytest.raises(WrongAnswer) as caught:
            rows.teacher.targets(feed.batch(1)[0])
        assert caught.value.exit_code == 3
        assert re.search(r"row \d+|the number NaN, which is no JSON", str(caught.value))
    assert len(answers_in(tmp_path / "answers.sqlite")) == 4
    assert_nothing_wrong_is_kept(tmp_path, undisturbed)


def spoiled(teacher: Failing, spoil):
    def fault(request):
        reply = teacher.well(request)
        spoil(reply)
        return reply

    return fault


def test_a_wrong_answer_ends_the_run_where_it_is_saved(student, undisturbed, tmp_path):
    with failing() as (server, teacher):
        teacher.faults = {3: teacher.once(spoiled(teacher, spoil_positive))}
        c = config_for(student, server.base, **READ_IN_TURN)
        with pytest.raises(WrongAnswer, match=r"a probability above 1.*got to step 3 of 6"):
            gkdjax.run(c, tmp_path)
        assert (tmp_path / "checkpoints" / "3").is_dir()
        assert_nothing_wrong_is_kept(tmp_path, undisturbed)
        gkdjax.run(c, tmp_path)
    assert_equal(tmp_path, undisturbed)


def test_the_key_is_nowhere_but_at_the_server(
    student, undisturbed, tmp_path, monkeypatch, capfd, caplog
):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    echoed = {"error": {"message": f"bad key {KEY}, sent as Bearer {KEY}"}}
    elsewhere = {"Location": f"/elsewhere?key={KEY}"}
    told = []
    with failing() as (server, teacher):
        teacher.faults = {
            0: teacher.once(lambda request: Reply(echoed, status=503)),
            1: teacher.once(lambda request: Reply(silent=True, delay_s=1.5)),
            2: lambda request: Reply(echoed, status=401),
            4: lambda request: Reply(status=307, headers=elsewhere),
        }
        c = config_for(student, server.base, **READ_IN_TURN, teacher__timeout_s=1.0)
        c.teacher.api_key_env = "TEACHER_KEY"
        for step, status in ((2, "status 401"), (4, "is redirected to")):
            with pytest.raises(TeacherRefused, match=status) as caught:
                gkdjax.run(c, tmp_path)
            assert caught.value.exit_code == 2
            assert f"got to step {step} of 6" in str(caught.value)
            told.append(everything_in(caught.value))
            del teacher.faults[step]
        gkdjax.run(c, tmp_path)
        assert {r.headers["Authorization"] for r in server.requests} == {f"Bearer {KEY}"}
    assert_equal(tmp_path, undisturbed)
    out, err = capfd.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    for text in (str(told), out, err, caplog.text, *(str(path) for path in files)):
        assert KEY not in text
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


def everything_in(error: GkdjaxError) -> str:
    """The traceback with all that led to it."""
    return "".join(traceback.format_exception(error))
