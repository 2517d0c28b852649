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
from gkdjax.utils.errors import UserError

ALL = Capabilities(max_top_k=None, dense=True, samples=True, temperature=True)
SERVER = Capabilities(max_top_k=20, dense=False, samples=False, temperature=False)
OWN_TEXT = dataclasses.replace(ALL, scores=False, on_policy=False, limits="it ignores echo")
STORE = dataclasses.replace(ALL, on_policy=False, limits="teacher.offline=True")
NOTHING = Needs(samples=False, scores=(), on_policy=False)
SAMPLES = NOTHING._replace(samples=True)
ROWS = NOTHING._replace(scores=["rows of data.train"])
STUDENT = Needs(samples=False, scores=["what the student writes"], on_policy=True)
EASY = {"top_k": 20, "temperature": 1.0, "tail": "bucket", "needs": NOTHING}


@pytest.mark.parametrize(
    ("can", "changed", "words"),
    [
        (ALL, {}, ()),
        (ALL, {"top_k": None}, ()),
        (ALL, {"top_k": 10**6}, ()),
        (ALL, {"temperature": 2.0}, ()),
        (ALL, {"needs": SAMPLES}, ()),
        (SERVER, {}, ()),
        # A truncated teacher is taken to another temperature exactly, but without its tail.
        (SERVER, {"temperature": 2.0, "tail": "renormalize"}, ()),
        (OWN_TEXT, {}, ()),
        (STORE, {"needs": ROWS}, ()),
        (SERVER, {"top_k": None}, ("top_k=None asks for the whole vocabulary", "20 or less")),
        (SERVER, {"top_k": 21}, ("teacher.top_k=21", "limit of 20")),
        (SERVER, {"temperature": 0.5}, ("gkd.temperature=0.5", "gkd.temperature=1.0")),
        (SERVER, {"needs": SAMPLES}, ("cannot write responses", "'response'")),
        (OWN_TEXT, {"needs": ROWS}, ("ignores echo", "rows of data.train", "_fraction=0")),
        (OWN_TEXT, {"needs": STUDENT}, ("what the student writes",)),  # one reason, not two
        (STORE, {"needs": STUDENT}, ("teacher.offline=True", "gkd.on_policy_fraction=0")),
    ],
)
def test_a_refusal_names_the_key_and_what_would_work(can, changed, words):
    reasons = refusals(can, **(EASY | changed))
    assert len(reasons) == bool(words)
    assert all(word in reasons[0] for word in words)


def test_all_reasons_come_at_once():
    everything = {"top_k": None, "temperature": 2.0, "tail": "renormalize", "needs": SAMPLES}
    assert len(refusals(SERVER, **everything)) == 3


class Mine:
    capabilities = ALL
    chat = None
    description = "mine"
    targets = sample = lambda self, *_: None


class Remote(Mine):
    ask = Mine.targets


class Reporting(Mine, TeacherHooks):
    def report(self):
        return {"asked": 3}


def test_any_object_with_the_members_is_a_teacher_and_may_have_hooks():
    members = {name: value for name, value in vars(Mine).items() if not name.startswith("__")}
    assert len(members) == 5
    for missing in members:
        less = {name: value for name, value in members.items() if name != missing}
        assert not isinstance(type("Less", (), less)(), Teacher), missing
    for teacher, ahead in ((Mine(), 0), (Remote(), 4)):
        require_teacher(teacher)
        assert isinstance(teacher, RemoteTeacher) == bool(ahead)
        assert scoring.steps_ahead(teacher) == ahead
        found = hooks(teacher)
        assert (found.register([]), found.stop_on(None), found.report()) == (None, None, {})
        assert found.context.tokens is found.weights is None
    assert hooks(Reporting()).report() == {"asked": 3}
    with pytest.raises(UserError, match="is no teacher: see"):
        require_teacher("vllm")


def test_a_toggle_needs_a_longer_view_and_a_second_copy_is_announced(caplog):
    local.require_longer_view(True)
    with pytest.raises(ValueError, match=r"prefix_messages.*student_retained_turns.*'flax'"):
        local.require_longer_view(False)
    local.announce_second_copy(3 * 2**20, "the anchor")
    assert "the anchor keeps a frozen second copy of the student: 3.0 MiB" in caplog.text
