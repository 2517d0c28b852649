"""What a teacher has to have, and how one that cannot serve a config says so."""

import dataclasses

import pytest

from gkdjax.teachers import local, scoring
from gkdjax.teachers.base import (
    Capabilities,
    Needs,
    RemoteTeacher,
    Teacher,
    TeacherHooks,
    hooks,
    refusals,
    require_teacher,
)
from gkdjax.teachers.local import LocalTeacher
from gkdjax.utils.errors import UserError

ALL = Capabilities(max_top_k=None, dense=True, samples=True, temperature=True)
SERVER = Capabilities(max_top_k=20, dense=False, samples=False, temperature=False)
NOTHING = Needs(samples=False, scores=(), on_policy=False)
SAMPLES = NOTHING._replace(samples=True)
EASY = {"top_k": 20, "temperature": 1.0, "tail": "bucket", "needs": NOTHING}


def test_an_in_process_teacher_can_do_everything():
    assert LocalTeacher.capabilities == ALL
    for changed in (
        {},
        {"top_k": None},
        {"top_k": 10**6},
        {"temperature": 2.0},
        {"needs": SAMPLES},
    ):
        assert refusals(ALL, **(EASY | changed)) == []
    assert refusals(SERVER, **EASY) == []
    # A truncated teacher is taken to another temperature exactly, but without its tail.
    assert refusals(SERVER, **(EASY | {"temperature": 2.0, "tail": "renormalize"})) == []


@pytest.mark.parametrize(
    "changed, reason, advice",
    [
        ({"top_k": None}, "teacher.top_k=None asks for the whole vocabulary", "20 or less"),
        ({"top_k": 21}, "teacher.top_k=21", "limit of 20"),
        ({"temperature": 0.5}, "gkd.temperature=0.5", "gkd.temperature=1.0"),
        ({"needs": SAMPLES}, "cannot write responses", "'response'"),
    ],
)
def test_each_refusal_names_the_key_and_what_would_work(changed, reason, advice):
    (message,) = refusals(SERVER, **(EASY | changed))
    assert reason in message
    assert advice in message


def test_all_reasons_come_at_once():
    everything = {"top_k": None, "temperature": 2.0, "tail": "renormalize", "needs": SAMPLES}
    assert len(refusals(SERVER, **everything)) == 3


def test_text_of_others_is_refused_to_a_teacher_that_cannot_read_it():
    own_text = dataclasses.replace(ALL, scores=False, on_policy=False, limits="it ignores echo")
    store = dataclasses.replace(ALL, on_policy=False, limits="teacher.offline=True")
    rows = NOTHING._replace(scores=["rows of data.train"])
    student = Needs(samples=False, scores=["what the student writes"], on_policy=True)
    assert refusals(own_text, **EASY) == refusals(store, **(EASY | {"needs": rows})) == []
    (message,) = refusals(own_text, **(EASY | {"needs": rows}))
    assert "it ignores echo" in message
    assert "rows of data.train" in message
    assert "on_policy_fraction=0" in message
    (message,) = refusals(own_text, **(EASY | {"needs": student}))  # one reason, told once
    assert "what the student writes" in message
    (message,) = refusals(store, **(EASY | {"needs": student}))
    assert "teacher.offline=True" in message
    assert "gkd.on_policy_fraction=0" in message


@dataclasses.dataclass
class Mine:
    capabilities = ALL
    chat = None
    description = "mine"

    def targets(self, batch):
        raise NotImplementedError

    def sample(self, prompts, seeds, sampling):
        raise NotImplementedError


def test_any_object_with_the_members_is_a_teacher():
    assert isinstance(Mine(), Teacher)
    assert not isinstance(Mine(), RemoteTeacher)
    for missing in ("capabilities", "chat", "description", "targets", "sample"):
        members = {name: getattr(Mine, name) for name in vars(Mine) if name != missing}
        keep = {name: members[name] for name in members if not name.startswith("__")}
        assert not isinstance(type("Less", (), keep)(), Teacher), missing


class Remote(Mine):
    def ask(self, batch, names):
        raise NotImplementedError


class Reporting(Mine, TeacherHooks):
    def report(self):
        return {"asked": 3}


def test_hooks_are_the_teacher_s_own_or_do_nothing():
    for teacher in (Mine(), Remote()):
        require_teacher(teacher)
        told = hooks(teacher)
        assert (told.register([]), told.stop_on(None), told.report()) == (None, None, {})
        assert told.context.tokens is told.weights is None
    assert hooks(Reporting()).report() == {"asked": 3}
    assert [scoring.steps_ahead(t) for t in (Mine(), Remote(), Reporting())] == [0, 4, 0]
    with pytest.raises(UserError, match="is no teacher: see"):
        require_teacher("vllm")


def test_a_toggle_without_a_longer_view_is_refused():
    local.require_longer_view(True)
    with pytest.raises(ValueError, match=r"prefix_messages.*student_retained_turns.*'flax'"):
        local.require_longer_view(False)


def test_a_second_copy_is_announced_with_its_size(monkeypatch):
    lines = []
    monkeypatch.setattr(local.logging, "warning", lambda text, *args: lines.append(text % args))
    local.announce_second_copy(3 * 2**20, "the anchor")
    assert "the anchor" in lines[0]
    assert "3.0 MiB" in lines[0]
