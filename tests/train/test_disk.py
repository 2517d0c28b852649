"""A run whose disk takes no more at each of its moments, or whose small files were damaged."""

import contextlib
import errno
import shutil

import jax
import pytest
from small_runs import ConstantTeacher, outcome, small

import gkdjax
from gkdjax.models.hf import writer
from gkdjax.train import checkpoint
from gkdjax.utils import files
from gkdjax.utils.errors import NotWritten, Preempted

# A file -> whether it is refused before the first checkpoint, or after it.
FIRST = (
    "run",
    "config.json",
    "clock.json",
    "models.json",
    "ending.json",
    "trajectories_train.jsonl",
)
FIRST += ("rows.json", "before.json", "answers.jsonl", "samples.jsonl", "metrics.jsonl")
LATER = ("trajectories_student.jsonl", "run", "metrics.jsonl", "answers.jsonl", "merged")
LATER += ("report.png", "results.json", "report.html")


@pytest.fixture(scope="module")
def whole(student, tmp_path_factory):
    """(config, directory) of a run that nothing disturbs."""
    c = small(student, teacher__top_k=1, train__steps=6, gkd__on_policy_fraction=0.5)
    c.log.tensorboard = True
    path = tmp_path_factory.mktemp("whole")
    gkdjax.run(c, path, teacher=ConstantTeacher())
    return c, path


@pytest.mark.slow(90)
def test_a_disk_that_fills_at_every_moment_costs_nothing_but_starts(whole, tmp_path, monkeypatch):
    (c, undisturbed), run = whole, tmp_path / "run"  # in which the lock is made
    writing = files.writing

    @contextlib.contextmanager
    def full(path):
        with writing(path):
            if path.name == refused and bool(checkpoint.saved_steps(run)) == late:
                raise OSError(errno.ENOSPC, "No space left on device")
            yield

    for module in (files, writer):
        monkeypatch.setattr(module, "writing", full)
    moments = [(name, False, NotWritten) for name in FIRST]
    for refused, late, error in moments + [(name, True, Preempted) for name in LATER]:
        with pytest.raises(error, match=rf"{refused} cannot be written: No space left on device"):
            gkdjax.run(c, run, teacher=ConstantTeacher())
        assert bool(checkpoint.saved_steps(run)) == late
        jax.clear_caches()
    refused = None
    gkdjax.run(c, run, teacher=ConstantTeacher())
    assert outcome(run) == outcome(undisturbed)


def test_damage_is_told_and_the_run_goes_on(whole, tmp_path, caplog):
    c, undisturbed = whole
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for name in ("6", "merged"):
        shutil.rmtree(run / ("checkpoints" if name.isdigit() else ".") / name)
    for name in ("results.json", "before.json", "ending.json"):
        (run / name).write_bytes(b"\0" * 100)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    (run / "samples.jsonl").write_bytes(b"")
    gkdjax.run(c, run, teacher=ConstantTeacher())
    assert outcome(run) == outcome(undisturbed)
    for told in ("results.json does not", "before.json does not", "metrics.jsonl is damaged from"):
        assert told in caplog.text
    assert "samples.jsonl lacks the steps [0]" in caplog.text
