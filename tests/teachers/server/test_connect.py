"""Other weights behind the same name are not taken for those that a run began with."""

import contextlib

import pytest
from fake_server import FakeServer, Reply
from fake_teacher import FakeTeacher
from server_runs import READ_IN_TURN, READ_ROWS, answers_in, config_for, rows_asked
from small_runs import losses_hex

import gkdjax
from gkdjax import config
from gkdjax.teachers.server import connect, scheduler
from gkdjax.teachers.server.dialects.openai import Chat, CompletionsById
from gkdjax.teachers.server.transport import client
from gkdjax.train import setup
from gkdjax.utils.errors import TeacherRefused, UserError


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    monkeypatch.setattr(client, "pause", lambda closed, seconds: closed.wait(0.01))


class Replaced(FakeTeacher):
    """Other weights from some row request on, after an outage or without one."""

    at, seen, outage = 4, 0, True

    def __call__(self, request):
        self.seen += bool(rows_asked([request]))
        if rows_asked([request]) and self.seen == self.at:
            self.logprob_table = FakeTeacher(seed=5).logprob_table
            if self.outage:
                return Reply(silent=True)
        return super().__call__(request)


def run_at(teacher, c, workdir):
    """A run with this teacher -> (its results, what it asked)."""
    with FakeServer(teacher) as server:
        c.teacher.api_base = server.base
        return gkdjax.run(c, workdir), server.requests


@pytest.mark.parametrize("outage", [True, False])
def test_a_server_that_comes_back_with_other_weights_ends_the_run(
    student, tmp_path, monkeypatch, outage
):
    monkeypatch.setattr(scheduler, "_PROBE_EVERY", 2)
    c = config_for(student, "", **READ_IN_TURN)
    teacher = Replaced()
    teacher.outage = outage
    with pytest.raises(TeacherRefused, match=r"other weights than before.* got to step \d of 6"):
        run_at(teacher, c, tmp_path / "run")
    run_at(FakeTeacher(), c, tmp_path / "right")
    kept, right = (answers_in(tmp_path / run / "answers.sqlite") for run in ("run", "right"))
    wrong = [key for key in kept if kept[key] != right[key]]
    assert len(wrong) <= (0 if outage else 4)  # one request of four rows, before it was tried again


def test_text_of_another_teacher_is_not_taken_for_its_own(student, tmp_path):
    c = config_for(student, "", data__train=[{"prompt": "ask"}], train__steps=1)
    run_at(FakeTeacher(), c, tmp_path / "first")
    c.rollout.reuse = str(tmp_path / "first" / "trajectories_train.jsonl")
    _, requests = run_at(FakeTeacher(seed=5), c, tmp_path / "second")
    asked = [row for row in rows_asked(requests) if "prompt_logprobs" in row]
    assert len(asked) == 1  # the text is taken, what the other one predicted there is not
    assert losses_hex(tmp_path / "first") != losses_hex(tmp_path / "second")


def test_a_run_is_asked_the_way_that_it_began_with(student, tmp_path, monkeypatch):
    """Since then there may be a better one, but its answers to the probe are others."""

    def dialect(workdir):
        workdir.mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            return type(setup.read(config.parse(c), workdir, None, stack).teacher.pool.dialect)

    with FakeServer(FakeTeacher(by_text=True, extensions=True)) as server:
        rows = [{"prompt": "ask"}] * 4
        c = config_for(student, server.base, teacher__backend="openai", data__train=rows)
        with monkeypatch.context() as before:
            before.setitem(connect.DIALECTS, "openai", {"chat": Chat})
            assert dialect(tmp_path / "run") is Chat
        assert dialect(tmp_path / "run") is Chat
        assert dialect(tmp_path / "new") is CompletionsById


def test_offline_a_run_goes_on_with_the_weights_that_it_began_with(student, tmp_path):
    store = str(tmp_path / "shared.sqlite")
    rows = {"data__train": READ_ROWS[:8], "train__steps": 4, "teacher__store": store}
    c = config_for(student, "", **rows, checkpoint__every_steps=2)
    whole, _ = run_at(FakeTeacher(), c, tmp_path / "begun")
    (tmp_path / "begun" / "results.json").unlink()  # as if it had not come to its end
    run_at(FakeTeacher(seed=5), c, tmp_path / "later")
    c.teacher.offline = True
    assert gkdjax.run(c, tmp_path / "begun")["loss"] == whole["loss"]


def test_a_store_that_fails_loses_no_step(student, tmp_path, monkeypatch):
    original, puts = scheduler.AnswerStore.put, []

    def put(self, fingerprint, items):
        puts.append(items)
        if len(puts) > 3:
            raise UserError("the disk is full")
        return original(self, fingerprint, items)

    monkeypatch.setattr(scheduler.AnswerStore, "put", put)
    how = {"checkpoint__every_steps": 100, "eval__every_steps": None}
    with pytest.raises(UserError, match=r"the disk is full.*got to step (\d) of 6"):
        run_at(FakeTeacher(), config_for(student, "", **READ_IN_TURN, **how), tmp_path / "run")
