"""Whose text a run learns from: patterns, refills, and a teacher that keeps what it predicted."""

import numpy as np
import pytest
from small_runs import ConstantTeacher, metrics, small

import gkdjax
from gkdjax.teachers.local import LocalTeacher
from gkdjax.types import Completion
from gkdjax.utils.errors import TrainingFailure, UserError
from gkdjax.utils.files import read_lines


class Moody(ConstantTeacher):
    """Says "K" to every second seed, nothing at all to some, and "2" to the others."""

    def sample(self, prompts, seeds, sampling):
        says = {0: [50, 5], 1: [25, 5], 2: [50, 5], 3: []}
        return [Completion(np.asarray(says[seed % 4], np.int32), True) for seed in seeds]


def test_text_without_the_pattern_is_refilled_dropped_counted_and_named(student, tmp_path, caplog):
    c = small(student, teacher__top_k=1, context__target_content_pattern="^K$")
    c.rollout.max_retries = 1
    c.data.train = [{"prompt": f"ask {i}"} for i in range(40)]
    results = gkdjax.run(c, tmp_path, teacher=Moody(50, 5))
    lines = read_lines(tmp_path / "trajectories_train.jsonl")
    assert len(lines) == 40
    gone = {line["row"] for line in lines if line["text"] != "K"}
    rows = results["rows"]["train"]
    assert gone and {*rows["unmatched"], *rows["empty"]} == gone
    assert {line["row"] for line in lines if line["text"] == ""} == {*rows["empty"]}
    assert rows["refused_responses"] == sum(line["refused"] for line in lines) > len(gone)
    assert {line["refused"] for line in lines} == {0, 1, 2}
    assert "in 2 attempts): data.train:" in caplog.text
    assert all(line["targets"] == 8 for line in metrics(tmp_path))  # "K" and its end, four rows


def test_a_pattern_that_never_matches_is_told_with_a_response(student, tmp_path):
    c = small(student, teacher__top_k=1, context__target_content_pattern="[0-9]{3}")
    with pytest.raises(
        UserError,
        match=r"no row of data\.train is left: 6 rows: .*'\[0-9\]\{3\}', or no such resp.* in 5",
    ) as caught:
        gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5))
    assert "The first response was 'K'" in str(caught.value)


def test_a_pattern_that_does_not_compile_is_told_before_anything_is_read(tmp_path):
    c = small("nowhere", context__target_content_pattern="(K")
    with pytest.raises(UserError, match=r"context\.target_content_pattern = '\(K': is no regular"):
        gkdjax.run(c, tmp_path)


def test_on_policy_rows_without_the_pattern_teach_nothing_and_are_counted(student, tmp_path):
    c = small(student, teacher__top_k=1, gkd__on_policy_fraction=1.0)
    c.context.target_content_pattern = "^[A-Za-z]"
    c.rollout.max_retries = 1
    c.rollout.temperature, c.rollout.top_p = 1.0, 1.0
    c.train.steps, c.optim.learning_rate = 8, 1e-5  # it goes on writing at random
    teacher = ConstantTeacher(50, 5)
    gkdjax.run(c, tmp_path, teacher=teacher)
    lines = metrics(tmp_path)
    assert 0 < sum(line["dropped_rows"] for line in lines) < 4 * 8
    for line in lines:
        assert line["refused_responses"] >= line["dropped_rows"]
        assert line["targets"] <= 4 * (line["on_policy_rows"] - line["dropped_rows"])


def test_an_on_policy_batch_that_lost_all_its_rows_stops_the_run(student, tmp_path):
    c = small(student, teacher__top_k=1, gkd__on_policy_fraction=1.0)
    c.context.target_content_pattern = "never this"
    with pytest.raises(TrainingFailure, match=r"no target token; 4 rows .*, of 4 of which no resp"):
        gkdjax.run(c, tmp_path, teacher=ConstantTeacher(50, 5))


def test_a_teacher_that_wrote_the_text_is_not_asked_again(student, other, tmp_path, monkeypatch):
    c = small(student, teacher__backend="flax", teacher__model=other, teacher__top_k=5)
    c.data.train = [{"prompt": f"ask {i}" + " more" * (i % 2)} for i in range(6)]
    c.train.steps = 3
    asked = []
    scores = LocalTeacher.targets
    monkeypatch.setattr(LocalTeacher, "targets", lambda *a: asked.append(1) or scores(*a))
    gkdjax.run(c, tmp_path / "kept", teacher=None)
    assert not asked
    kept = [p.name for p in sorted((tmp_path / "kept" / "trajectories_train.kept").iterdir())]
    assert kept == ["00000000.safetensors", "00000004.safetensors"]
    # The same text, and a teacher that has to read it: the same losses, but for rounding.
    monkeypatch.setattr("gkdjax.data.batching.cached_targets", lambda *a: None)
    gkdjax.run(c, tmp_path / "read", teacher=None)
    assert len(asked) == 3
    both = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("kept", "read")]
    np.testing.assert_allclose(*both, rtol=1e-4)


def test_what_was_kept_is_read_back_and_damage_is_named(student, other, tmp_path, monkeypatch):
    c = small(student, teacher__backend="flax", teacher__model=other, teacher__top_k=5)
    c.train.steps = 2
    gkdjax.run(c, tmp_path / "whole", teacher=None)
    again = tmp_path / "again"
    again.mkdir()
    kept = again / "trajectories_train.kept"
    kept.mkdir()
    for file in (
        "trajectories_train.jsonl",
        *(f"trajectories_train.kept/{n:08d}.safetensors" for n in (0, 4)),
    ):
        (again / file).write_bytes((tmp_path / "whole" / file).read_bytes())
    monkeypatch.setattr(LocalTeacher, "targets", None)  # whoever asks it fails
    gkdjax.run(c, again, teacher=None)
    both = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("whole", "again")]
    assert both[0] == both[1]
    (again / "results.json").unlink()
    file = kept / "00000004.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"00000004\.safetensors cannot be read: .*; remove "):
        gkdjax.run(c, again, teacher=None)
    file.write_bytes((kept / "00000000.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"00000004\.safetensors .* does not hold the \d+ tokens"):
        gkdjax.run(c, again, teacher=None)
    file.unlink()  # not scored anew in silence: that would be equal only up to rounding
    with pytest.raises(UserError, match=r"00000004\.safetensors cannot be read: .*; remove "):
        gkdjax.run(c, again, teacher=None)
