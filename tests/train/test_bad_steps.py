"""A step whose numbers are not finite changes nothing, names its rows, and does not end the run."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_server import FakeServer
from fake_teacher import FakeTeacher
from small_runs import ConstantTeacher, metrics, small

import gkdjax
from gkdjax.tools import replay_batch
from gkdjax.train import bad_steps
from gkdjax.train import metrics as train_metrics
from gkdjax.train.checkpoint import saved_steps
from gkdjax.train.metrics import MetricsRecorder
from gkdjax.utils.errors import TeacherUnreachable, TrainingFailure, UserError
from gkdjax.utils.files import read_lines


class FaultyTeacher(ConstantTeacher):
    """Its logprobs of the second row are NaN in some of its calls."""

    def __init__(self, *at: int):
        super().__init__(50, 5)
        self.at = at

    def targets(self, batch):
        targets = super().targets(batch)
        if self.calls - 1 in self.at:
            row = jnp.arange(len(batch.target_ids_BN)) == 1
            targets = jax.tree.map(
                lambda x: (
                    x
                    if jnp.issubdtype(x.dtype, jnp.integer)
                    else jnp.where(row.reshape(-1, *[1] * (x.ndim - 1)), jnp.nan, x)
                ),
                targets,
            )
        return targets


def answered(student, **changes):
    c = small(student, teacher__top_k=1, train__steps=5, **changes)
    c.data.train = [{"prompt": f"ask {i}", "response": "yes " * (1 + i)} for i in range(6)]
    return c


def test_a_bad_batch_is_left_out_counted_named_and_kept(student, tmp_path, caplog, capsys):
    results = gkdjax.run(answered(student), tmp_path, FaultyTeacher(2))
    assert results["bad_steps"] == 1 and results["steps"] == 5
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 3, 4]
    (line,) = read_lines(tmp_path / bad_steps.LINES)
    assert line["step"] == 2 and "nan" in line["reason"] and len(line["rows"]["loss"]) == 4
    assert re.search("steps that changed nothing +1", capsys.readouterr().out)
    told = f"step 2 changed nothing: {line['reason']}; 4 rows ({', '.join(line['rows']['loss'])})"
    assert told in caplog.text
    assert replay_batch.main([str(tmp_path), "--step=2"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[1] for row in rows] == line["rows"]["loss"]
    assert [row.endswith("the teacher") for row in rows] == [False, True, False, False]
    assert all(math.isfinite(float(row.split()[4])) for row in rows[::2])
    (tmp_path / "bad_steps" / "of mine.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"has no bad step 3; there are \[2\]"):
        bad_steps.read(tmp_path, 3)


@pytest.mark.parametrize("teacher", ["object", "whole vocabulary", "server"])
def test_a_batch_computed_again_has_the_loss_that_it_had(student, tmp_path, monkeypatch, teacher):
    """Good steps are written down as bad ones here, as their losses are known."""
    record = MetricsRecorder.record

    def and_write(self, step, sums, batch):
        bad_steps.write(tmp_path, step, "", batch)
        record(self, step, sums, batch)

    monkeypatch.setattr(MetricsRecorder, "record", and_write)
    c = answered(student, checkpoint__every_steps=1, gkd__divergence="reverse_kl")
    c.anchor.data = [{"prompt": f"other {i}", "response": "no"} for i in range(3)]
    c.anchor.batch_size, c.train.steps = 4, 2
    with FakeServer(FakeTeacher()) as server:  # it is gone when the batch is computed again
        if teacher == "whole vocabulary":
            c.teacher.top_k = None
        elif teacher == "server":
            c.teacher.backend, c.teacher.api_base, c.teacher.top_k = "vllm", server.base, 8
        gkdjax.run(c, tmp_path, ConstantTeacher(50, 5) if teacher == "object" else None)
    for line in metrics(tmp_path):
        found = [*replay_batch.replay(tmp_path, line["step"])]
        for name, key in (("loss", "loss"), ("anchor", "anchor_loss")):
            rows = [row for row in found if row.part == name]
            mean = np.average([row.loss for row in rows], weights=[row.targets for row in rows])
            assert mean == pytest.approx(line[key], rel=1e-5, abs=1e-8)
            assert all(row.teacher_is_finite for row in rows)


def test_too_many_in_a_row_end_the_run_and_it_goes_on_mended(student, tmp_path):
    c = answered(student, train__max_bad_steps=2)
    with pytest.raises(TrainingFailure, match=r"2 steps in a row, up to step 3.*learning_rate"):
        gkdjax.run(c, tmp_path, FaultyTeacher(2, 3, 4))
    assert saved_steps(tmp_path) == [2] and not (tmp_path / "merged").exists()
    c.gkd.temperature = 2.0
    with pytest.raises(UserError, match=r"differs in config\.gkd\.temperature \(now 2\.0"):
        gkdjax.run(c, tmp_path, ConstantTeacher(50, 5))
    c.gkd.temperature, c.optim.learning_rate = 1.0, 1e-3
    assert {path.stem for path in (tmp_path / "bad_steps").iterdir()} == {"2", "3"}
    results = gkdjax.run(c, tmp_path, FaultyTeacher(0))
    assert {path.stem for path in (tmp_path / "bad_steps").iterdir()} == {"2"}
    assert results["bad_steps"] == 1 and [m["step"] for m in metrics(tmp_path)] == [0, 1, 3, 4]
    (line,) = read_lines(tmp_path / "history.jsonl")
    assert line["changed"] == ["config.optim.learning_rate (now 0.001, was 0.01)"]
    assert "2 steps in a row" in line["failure"]
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["learning_rate"] == 1e-3


def test_bad_steps_in_a_row_are_counted_over_starts(student, tmp_path):
    c = answered(student, train__max_bad_steps=3, checkpoint__every_steps=1)

    class Gone(FaultyTeacher):
        def targets(self, batch):
            if self.calls == 3:
                raise TeacherAway("gone")
            return super().targets(batch)

    class TeacherAway(ConnectionError):
        pass

    with pytest.raises(TeacherAway):
        gkdjax.run(c, tmp_path, Gone(1, 2))
    with pytest.raises(TrainingFailure, match="3 steps in a row, up to step 3"):
        gkdjax.run(c, tmp_path, FaultyTeacher(0))


@pytest.mark.parametrize("rate", [1e30, 1e38])
def test_an_absurd_update_is_not_made_saved_or_exported(student, tmp_path, rate):
    c = answered(student, optim__learning_rate=rate)
    c.train.steps = 1
    with pytest.raises(TrainingFailure, match="step 0 changed each parameter by"):
        gkdjax.run(c, tmp_path, ConstantTeacher(50, 5))
    assert not (tmp_path / "merged").exists()
    c.optim.learning_rate = 1e-3
    assert gkdjax.run(c, tmp_path, ConstantTeacher(50, 5))["exports"] == ["merged/"]


class Away(ConstantTeacher):
    """A server that is gone after its first batch."""

    def targets(self, batch):
        if self.calls == 1:
            raise TeacherUnreachable("gone")
        return super().targets(batch)


@pytest.mark.parametrize(
    ("every_steps", "teacher"), [(1, ConstantTeacher(50, 5)), (9, Away(50, 5))]
)
def test_a_state_is_saved_only_if_its_own_loss_is_finite(
    student, tmp_path, monkeypatch, every_steps, teacher
):
    monkeypatch.setattr(train_metrics, "LARGEST_UPDATE", math.inf)
    message = "after step 0 the loss is nan, so the state is not"
    c = answered(student, optim__learning_rate=1e38, checkpoint__every_steps=every_steps)
    with pytest.raises(TrainingFailure, match=message):
        gkdjax.run(c, tmp_path, teacher)
    assert saved_steps(tmp_path) == []


def test_a_run_without_a_good_step_exports_nothing(student, tmp_path):
    c = answered(student)
    c.train.steps = 2
    with pytest.raises(TrainingFailure, match="none of the 2 steps changed anything"):
        gkdjax.run(c, tmp_path, FaultyTeacher(0, 1))
    assert saved_steps(tmp_path) == [] and not (tmp_path / "merged").exists()
