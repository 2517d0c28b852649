"""A save that was killed on the way leaves the checkpoint before it in force, and its own way free.

Damage to checkpoints that were whole once is in tests/train/test_checkpoint.py.
"""

import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import resume_save

from gkdjax.train.checkpoint import Checkpoints

HERE = pathlib.Path(__file__).parents[1]


def assert_is(state, step: int) -> None:
    wanted = jax.tree.leaves(resume_save.state_at(step))
    for got, leaf in zip(jax.tree.leaves(state), wanted, strict=True):
        np.testing.assert_array_equal(got, leaf)


def restored(workdir: pathlib.Path):
    checkpoints = Checkpoints(workdir, keep=5)
    try:
        return checkpoints.restore(resume_save.state_at(0))
    finally:
        checkpoints.close()


def names(workdir: pathlib.Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").iterdir()}


@pytest.mark.parametrize("name", ["state", "7"])
def test_a_killed_save_is_as_if_it_had_not_begun(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    killed = subprocess.run([sys.executable, HERE / "resume_save.py", tmp_path, name], timeout=600)
    assert killed.returncode == -signal.SIGKILL
    left = names(tmp_path)
    assert len(left) == 2 and "5" in left and "7" not in left

    assert_is(restored(tmp_path), resume_save.LEFT)
    assert names(tmp_path) == {"5"}  # what was left is gone: it may be as large as a model
    checkpoints = Checkpoints(tmp_path, keep=5)
    assert_is(checkpoints.restore(resume_save.state_at(0)), resume_save.LEFT)
    checkpoints.save(resume_save.state_at(resume_save.BEGUN))  # the resumed run comes there again
    checkpoints.wait()
    checkpoints.close()
    assert_is(restored(tmp_path), resume_save.BEGUN)
    assert names(tmp_path) == {"5", "7"}
