"""Other weights behind the same name are not taken for those that a run began with."""

import pytest
from fake_server import FakeServer
from fake_teacher import VOCAB, FakeTeacher
from server_runs import READ_IN_TURN, config_for

import gkdjax
from gkdjax import config
from gkdjax.teachers.server import connect, scheduler
from gkdjax.teachers.server.dialects.openai import Chat, CompletionsById
from gkdjax.types import SamplingParams
from gkdjax.utils.errors import UserError

SAMPLING = SamplingParams(4, temperature=1.0, top_p=1.0)


def connected(chat, workdir, teacher, **settings):
    """The teacher of a run with this server; without one, offline."""
    with FakeServer(teacher) as server:
        settings = {"backend": "vllm", "api_base": server.base, "top_k": 8} | settings
        c = config.Teacher(**settings, offline=teacher is None)
        how = {"sampling": SAMPLING, "template_kwargs": {}}
        made = connect.connect(c, chat, VOCAB, workdir, workdir, **how)
        made.close()
        return made


def test_a_run_keeps_to_the_weights_that_it_began_with(chat, tmp_path):
    store = {"store": str(tmp_path / "shared.sqlite")}
    begun, later = tmp_path / "begun", tmp_path / "later"
    first = connected(chat, begun, FakeTeacher(), **store).description
    second = connected(chat, later, FakeTeacher(seed=5), **store).description
    assert first != second
    assert connected(chat, begun, None, **store).description == first
    assert connected(chat, later, None, **store).description == second
    assert connected(chat, tmp_path / "new", FakeTeacher(), **store).description == first
    with pytest.raises(UserError, match="began with other weights than bigram has now"):
        connected(chat, begun, FakeTeacher(seed=5), **store)
    with pytest.raises(UserError, match=r"has the teachers \['bigram'\], of which 0 fit"):
        connected(chat, tmp_path / "other", None, **store | {"top_k": 7})


def test_a_run_is_asked_the_way_that_it_began_with(chat, tmp_path, monkeypatch):
    """Since then there may be a better one, but its answers to the probe are others."""

    def dialect(workdir):
        teacher = FakeTeacher(by_text=True, extensions=True)
        return type(connected(chat, workdir, teacher, backend="openai").pool.dialect)

    with monkeypatch.context() as before:
        before.setitem(connect.DIALECTS, "openai", {"chat": Chat})
        assert dialect(tmp_path / "run") is Chat
    assert dialect(tmp_path / "run") is Chat
    assert dialect(tmp_path / "new") is CompletionsById


def test_a_store_that_fails_loses_no_step(student, tmp_path, monkeypatch):
    """A whole run: what it saves is shown by the step to which it got."""
    original, puts = scheduler.AnswerStore.put, []

    def put(self, fingerprint, items):
        puts.append(items)
        if len(puts) > 3:
            raise UserError("the disk is full")
        return original(self, fingerprint, items)

    monkeypatch.setattr(scheduler.AnswerStore, "put", put)
    how = {"checkpoint__every_steps": 100, "eval__every_steps": None}
    with FakeServer(FakeTeacher()) as server:
        c = config_for(student, server.base, **READ_IN_TURN, **how)
        with pytest.raises(UserError, match=r"the disk is full.*got to step \d of 6"):
            gkdjax.run(c, tmp_path / "run")
