"""Checkpoints come back to the bit; damage is found, named and passed over; so are killed saves."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import builders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from disks import longest_file
from jax.sharding import NamedSharding, PartitionSpec

from gkdjax.models import lora
from gkdjax.parallel.mesh import make_mesh
from gkdjax.parallel.sharding_rules import ShardingRules
from gkdjax.train import checkpoint
from gkdjax.train.checkpoint import Checkpoints
from gkdjax.train.step import init_state
from gkdjax.types import TrainState
from gkdjax.utils import files
from gkdjax.utils.errors import NotWritten, Preempted, UserError

DECODER, PARAMS = builders.small_model(intermediate_size=256)  # one leaf large enough to hit
OPTIMIZER = optax.adamw(1e-3)
TESTS = pathlib.Path(__file__).parents[1]


def state_at(step: int) -> TrainState:
    """A state in which every leaf, the optimizer's too, is random and belongs to `step` alone."""
    rng = np.random.default_rng(step)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.full(leaf.shape, step, leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(fill, init_state(builders.adapters(DECODER), OPTIMIZER))


def opened(workdir: pathlib.Path, keep: int = 5):
    return contextlib.closing(Checkpoints(workdir, keep))


def save(workdir: pathlib.Path, *steps: int, keep: int = 5) -> None:
    with opened(workdir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(state_at(step))
        checkpoints.wait()


def restore(workdir: pathlib.Path, like: TrainState | None = None) -> TrainState | None:
    with opened(workdir) as checkpoints:
        return checkpoints.restore(like or state_at(99))


def names(workdir: pathlib.Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").iterdir()}


def assert_is(state: TrainState, step: int) -> None:
    wanted = state_at(step)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for got, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == leaf.dtype
        np.testing.assert_array_equal(got, leaf)


def flip_a_bit(workdir: pathlib.Path, step: int) -> None:
    """In the middle of the largest file, where the numbers of the largest leaves are."""
    files = [path for path in (workdir / "checkpoints" / f"{step}").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x10
    largest.write_bytes(content)


@pytest.fixture
def errors(monkeypatch) -> list[str]:
    """What is logged as an error."""
    lines = []
    log = "gkdjax.train.checkpoint.logging.error"
    monkeypatch.setattr(log, lambda text, *args: lines.append(text % args))
    return lines


def test_a_state_comes_back_to_the_bit(tmp_path, errors):
    assert restore(tmp_path) is None
    save(tmp_path, 3, 7)
    state = restore(tmp_path)
    assert_is(state, 7)
    assert all(isinstance(a, lora.Adapter) for a in state.trainable.values())
    assert (state.trainable["layers/q_proj"].scale, state.opt_state[0].count) == (1.5, 7)
    lora.attach(PARAMS, state.trainable)
    assert errors == []


def test_only_the_newest_are_kept_and_a_step_is_saved_once(tmp_path):
    save(tmp_path, 1, 2, 3, 3, keep=2)
    assert {name for name in names(tmp_path) if name.isdigit()} == {"2", "3"}


@pytest.mark.parametrize("damage", ["flipped bit", "empty directory"])
def test_damage_is_named_and_passed_over_and_the_run_goes_on_saving(tmp_path, errors, damage):
    """Steps up to and past the damaged one are saved anew, and then found."""
    save(tmp_path, 5, 7)
    whole = 7
    if damage == "flipped bit":
        flip_a_bit(tmp_path, 7)
        whole = 5
    else:
        (tmp_path / "checkpoints" / "99").mkdir()
    with opened(tmp_path) as checkpoints:
        assert_is(checkpoints.restore(state_at(0)), whole)
        for step in (whole + 1, whole + 2):
            checkpoints.save(state_at(step))
        checkpoints.wait()
    if damage == "flipped bit":
        (error,) = errors
        leaves = [f"{path}/{half}" for path in state_at(0).trainable for half in "ab"]
        assert "checkpoint 7" in error and any(leaf in error for leaf in leaves)
    errors.clear()
    assert_is(restore(tmp_path), whole + 2)
    assert errors == []


def test_nothing_whole_is_an_error_and_not_a_new_start(tmp_path, errors):
    save(tmp_path, 5, 6)
    for step in (5, 6):
        flip_a_bit(tmp_path, step)
    with pytest.raises(UserError, match=r"none of the checkpoints \[6, 5\]"):
        restore(tmp_path)
    assert len(errors) == 2
    assert {"5", "6"} <= names(tmp_path)  # nothing was thrown away


def test_a_fingerprint_sees_each_number_and_its_place_but_not_the_mesh():
    numbers = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)

    def found(x):
        return checkpoint._fingerprints({"x": x})["x"]

    whole, mesh = found(numbers), make_mesh(fsdp=2, tensor=2)
    for axes in (("fsdp",), (None, "tensor"), ("fsdp", "tensor")):
        assert found(jax.device_put(numbers, NamedSharding(mesh, PartitionSpec(*axes)))) == whole
    assert found(numbers.reshape(6, 4)) == whole  # the checkpoint compares the shape
    swapped = numbers.copy()
    swapped[0, :2] = swapped[0, 1::-1]
    assert found(swapped) != whole
    for bit in range(32):
        flipped = numbers.copy().view(np.uint32)
        flipped[3, 5] ^= 1 << bit
        assert found(flipped.view(np.float32)) != whole
    assert found(numbers.astype(jnp.bfloat16)) != whole
    assert found(np.int32(7)) != found(np.int32(8))


def test_a_state_is_restored_onto_another_mesh(tmp_path, errors):
    def placed(state, **sizes):
        layout = ShardingRules.of(make_mesh(**sizes), DECODER.spec)
        return jax.device_put(state, layout.shardings_of(state))

    with opened(tmp_path) as checkpoints:
        checkpoints.save(placed(state_at(5), fsdp=2))
        checkpoints.wait()
    like = placed(state_at(0), tensor=2)
    state = restore(tmp_path, like)
    assert_is(state, 5)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == wanted.sharding
    assert errors == []


# Killed when all that belongs into the directory NAME ("state" or "7") is written, and the
# directory is about to get that name: whatever had been begun by then is left behind.
_KILLED = """
import os, pathlib, signal, sys
import jax.numpy as jnp
from gkdjax.train.checkpoint import Checkpoints
from gkdjax.types import TrainState

def state(step):
    return TrainState(jnp.int32(step), {"a": jnp.full(9, float(step))}, ())

def renamed(source, target, rename=os.rename, **options):
    if pathlib.Path(target).name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target, **options)

checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), keep=5)
checkpoints.save(state(5))
checkpoints.wait()
os.rename = renamed
checkpoints.save(state(7))
checkpoints.wait()
"""


def plain(step: int) -> TrainState:
    return TrainState(jnp.int32(step), {"a": jnp.full(9, float(step))}, ())


@pytest.mark.parametrize("name", ["state", "7"])
def test_a_killed_save_is_as_if_it_had_not_begun(tmp_path, monkeypatch, name):
    """SIGKILL ends the process that saves, so that it is another one than this."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    command = [sys.executable, "-c", _KILLED, str(tmp_path), name]
    assert subprocess.run(command, timeout=600).returncode == -signal.SIGKILL
    left = names(tmp_path)
    assert len(left) == 2 and "5" in left and "7" not in left
    with opened(tmp_path) as checkpoints:
        assert checkpoints.restore(plain(0)).trainable["a"][0] == 5
        assert names(tmp_path) == {"5"}  # what was left is gone: it may be as large as a model
        checkpoints.save(plain(7))  # the resumed run comes there again
        checkpoints.wait()
    assert restore(tmp_path, plain(0)).trainable["a"][0] == 7
    assert names(tmp_path) == {"5", "7"}


def test_lines_are_on_the_disk_before_a_checkpoint_is_begun(tmp_path, monkeypatch):
    files.append_line(tmp_path / "metrics.jsonl", {"step": 0})
    done, fsync, begin = [], os.fsync, ocp.CheckpointManager.save

    def recorded(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def begun(manager, step, **how):
        done.append(step)
        return begin(manager, step, **how)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(ocp.CheckpointManager, "save", begun)
    save(tmp_path, 1)
    assert done[:3] == [str(tmp_path / "metrics.jsonl"), str(tmp_path), 1]


def test_a_save_that_fails_is_made_good_later(tmp_path, monkeypatch, caplog):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(state_at(1))
        checkpoints.wait()
        with longest_file(2000):
            checkpoints.save(state_at(2))
            deadline = time.monotonic() + 60
            while not checkpoints.failed():
                assert time.monotonic() < deadline
        assert "checkpoints cannot be written: File too large" in caplog.text
        assert names(tmp_path) == {"1"}
        checkpoints.save(state_at(3), due=False)
        assert not checkpoints.failed()
        checkpoints.save(state_at(4), due=False)  # no longer needed
        assert names(tmp_path) == {"1", "3"}
    assert_is(restore(tmp_path), 3)


def test_a_save_that_fails_does_not_hide_what_ended_the_run(tmp_path, caplog):
    with longest_file(10), pytest.raises(KeyError), opened(tmp_path) as checkpoints:
        checkpoints.save(state_at(1))
        raise KeyError
    assert "checkpoints cannot be written: File too large" in caplog.text


def test_two_saves_that_fail_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 100)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(state_at(1))
        checkpoints.save(state_at(2), due=False)
        with pytest.raises(NotWritten, match=r"a checkpoint takes .* and 100 bytes are free"):
            checkpoints.save(state_at(3))
        with pytest.raises(NotWritten):
            checkpoints.wait()
    assert names(tmp_path) == set()


@pytest.mark.parametrize(("saved", "error"), [((), NotWritten), ((1, 3), Preempted)])
def test_a_full_disk_ends_a_run_by_what_is_saved(tmp_path, saved, error):
    save(tmp_path, *saved)
    match = "saved at step 3" if saved else "x cannot"
    with pytest.raises(error, match=match) as raised, checkpoint.continuable(tmp_path):
        raise NotWritten("x cannot be written")
    assert raised.value.exit_code == (75 if saved else 2)
