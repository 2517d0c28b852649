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
from small_runs import losses_hex, merged_weights, metrics

import gkdjax
from gkdjax import config
from gkdjax.rollout import teacher as rollout_teacher
from gkdjax.teachers.server.transport import client
from gkdjax.train import setup
from gkdjax.utils.errors import TeacherRefused, TeacherUnreachable, WrongAnswer

KEY = "canary-4711-sesame-4711"


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Short ones between attempts."""
    monkeypatch.setattr(client, "pause", lambda closed, seconds: closed.wait(0.01))


@contextlib.contextmanager
def failing(student, **changes):
    """(config, server, its handler, which may be given faults)."""
    teacher = Failing()
    with FakeServer(teacher) as server:
        yield config_for(student, server.base, **READ_IN_TURN, **changes), server, teacher


@pytest.fixture(scope="module")
def undisturbed(student, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    with failing(student) as (c, _, _):
        gkdjax.run(c, workdir)
    return workdir


def assert_equal(workdir: pathlib.Path, undisturbed: pathlib.Path) -> None:
    assert losses_hex(workdir) == losses_hex(undisturbed)
    assert merged_weights(workdir) == merged_weights(undisturbed)
    assert answers_in(workdir / "answers.sqlite") == answers_in(undisturbed / "answers.sqlite")


def assert_all_stored_are_right(workdir: pathlib.Path, undisturbed: pathlib.Path) -> None:
    right = answers_in(undisturbed / "answers.sqlite")
    assert answers_in(workdir / "answers.sqlite").items() <= right.items()


def test_what_passes_leaves_no_trace_in_the_run(student, undisturbed, tmp_path):
    with failing(student, teacher__max_retries=1000) as (c, server, teacher):
        faults = (
            restarting(server),
            lambda request: Reply(status=503, headers={"Retry-After": "9"}),
            teacher.spoiled(_nan),
            lambda request: Reply({"choices": []}, cut=5, reset=True),
            lambda request: Reply(silent=True),
            restarting(server),
        )
        teacher.faults = {step: teacher.once(fault) for step, fault in enumerate(faults)}
        results = gkdjax.run(c, tmp_path)
    assert results["teacher"]["retries"] >= 6
    assert_equal(tmp_path, undisturbed)


def test_a_row_that_the_server_trips_over_is_found_and_the_run_goes_on(
    student, undisturbed, tmp_path
):
    bad = []
    with failing(student, teacher__max_retries=2) as (c, _, teacher):

        def trip(request):
            bad[:] = bad or [request.body["prompt"][2]]
            if bad[0] in request.body["prompt"]:
                return Reply({"error": "index out of range"}, status=500)
            return teacher.well(request)

        teacher.faults = {3: trip}
        message = r"data.train:\d+: .*index out of range.*got to step 3 of 6, and is saved"
        with pytest.raises(TeacherUnreachable, match=message) as caught:
            gkdjax.run(c, tmp_path)
        assert caught.value.exit_code == 4
        assert len(answers_in(tmp_path / "answers.sqlite")) >= 3 + 3 * 4 + 2
        teacher.faults = {}
        gkdjax.run(c, tmp_path)
    assert_equal(tmp_path, undisturbed)


def test_a_server_that_stays_away_is_waited_for_and_then_the_same_call_goes_on(
    student, undisturbed, tmp_path
):
    with failing(student, teacher__max_retries=2, checkpoint__every_steps=100) as (c, _, teacher):
        teacher.faults = {5: lambda request: Reply(status=503)}
        with pytest.raises(TeacherUnreachable, match="got to step 5 of 6, and is saved"):
            gkdjax.run(c, tmp_path)
        assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2, 3, 4]
        assert (tmp_path / "checkpoints" / "5").is_dir()
        teacher.faults = {}
        before = teacher.answered
        gkdjax.run(c, tmp_path)
        assert teacher.answered - before == 33 + 4  # the preflight's, and the rows of one step
    assert_equal(tmp_path, undisturbed)


def _first(reply: Reply) -> list:
    return reply.body["choices"][0]["prompt_logprobs"]


def _positive(reply):
    next(iter(_first(reply)[-1].values()))["logprob"] = 0.5


def _nan(reply):
    next(iter(_first(reply)[-1].values()))["logprob"] = math.nan


def _shifted(reply):
    row = _first(reply)
    row[1:] = row[2:] + row[1:2]


def _unknown_id(reply):
    entry = _first(reply)[-1]
    best = max(entry, key=lambda i: entry[i]["logprob"])
    del entry[min(entry, key=lambda i: i == best)]  # any other stays
    entry["5000"] = {"logprob": -1.0}


def _too_few(reply):
    entry = _first(reply)[-1]
    for i in list(entry)[2:]:
        del entry[i]


SPOILED = {
    "positive": _positive,
    "nan": _nan,
    "shifted": _shifted,
    "unknown id": _unknown_id,
    "too few": _too_few,
    "short": lambda reply: _first(reply).pop(),
    "null": lambda reply: _first(reply).__setitem__(-1, None),
    "rows": lambda reply: reply.body["choices"].pop(),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_wrong_answer_is_neither_used_nor_stored(student, undisturbed, tmp_path, name):
    with failing(student) as (c, _, teacher), contextlib.ExitStack() as connections:
        c = config.parse(c)
        rows = setup.read(c, tmp_path, None, connections)
        how = rows.dataset, rows.teacher, tmp_path, rows.vocab_size
        dataset = rollout_teacher.prepare(c, "train", *how)
        rows.teacher.targets(dataset.batch(0)[0])
        teacher.faults = {1: teacher.spoiled(SPOILED[name])}
        with pytest.raises(WrongAnswer) as caught:
            rows.teacher.targets(dataset.batch(1)[0])
        assert caught.value.exit_code == 3
        assert re.search(r"row \d+|the number NaN, which is no JSON", str(caught.value))
    assert len(answers_in(tmp_path / "answers.sqlite")) == 4
    assert_all_stored_are_right(tmp_path, undisturbed)


def test_a_wrong_answer_ends_the_run_where_it_is_saved(student, undisturbed, tmp_path):
    with failing(student) as (c, _, teacher):
        teacher.faults = {3: teacher.spoiled(_positive)}
        with pytest.raises(WrongAnswer, match=r"a probability above 1.*got to step 3 of 6"):
            gkdjax.run(c, tmp_path)
        assert (tmp_path / "checkpoints" / "3").is_dir()
        assert_all_stored_are_right(tmp_path, undisturbed)
        teacher.faults = {}
        gkdjax.run(c, tmp_path)
    assert_equal(tmp_path, undisturbed)


def test_the_key_is_nowhere_but_at_the_server(
    student, undisturbed, tmp_path, monkeypatch, capfd, caplog
):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    echoed = {"error": {"message": f"bad key {KEY}, sent as Bearer {KEY}"}}
    elsewhere = {"Location": f"/elsewhere?key={KEY}"}
    changes = {"teacher__timeout_s": 1.0, "teacher__api_key_env": "TEACHER_KEY"}
    seen = []
    with failing(student, **changes) as (c, server, teacher):
        teacher.faults = {
            0: teacher.once(lambda request: Reply(echoed, status=503)),
            1: teacher.once(lambda request: Reply(silent=True, delay_s=1.5)),
            2: lambda request: Reply(echoed, status=401),
            4: lambda request: Reply(status=307, headers=elsewhere),
        }
        for step, status in ((2, "status 401"), (4, "is redirected to")):
            message = f"{status}.*got to step {step} of 6"
            with pytest.raises(TeacherRefused, match=message) as caught:
                gkdjax.run(c, tmp_path)
            assert caught.value.exit_code == 2
            seen += traceback.format_exception(caught.value)  # with all that led to it
            del teacher.faults[step]
        gkdjax.run(c, tmp_path)
        assert {r.headers["Authorization"] for r in server.requests} == {f"Bearer {KEY}"}
    assert_equal(tmp_path, undisturbed)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert KEY not in "".join([*seen, *capfd.readouterr(), caplog.text, *map(str, files)])
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
