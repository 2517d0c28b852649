"""Checkpoints come back to the bit, and damage is found, named and passed over."""

import pathlib

import builders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gkdjax.models import lora
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.parallel.sharding_rules import ShardingRules
from gkdjax.train import checkpoint
from gkdjax.train.checkpoint import Checkpoints
from gkdjax.train.step import init_state
from gkdjax.types import TrainState
from gkdjax.utils.errors import UserError

DECODER, PARAMS = builders.small_model(intermediate_size=256)  # one leaf large enough to hit
OPTIMIZER = optax.adamw(1e-3)


def state_at(step: int) -> TrainState:
    """A state in which every leaf, the optimizer's too, is random and belongs to `step` alone."""
    like = init_state(builders.adapters(DECODER), OPTIMIZER)
    rng = np.random.default_rng(step)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.full(leaf.shape, step, leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(fill, like)


def fresh() -> TrainState:
    return init_state(builders.adapters(DECODER, seed=99), OPTIMIZER)


def save(workdir: pathlib.Path, *steps: int, keep: int = 5) -> None:
    checkpoints = Checkpoints(workdir, keep)
    for step in steps:
        checkpoints.save(state_at(step))
    checkpoints.wait()
    checkpoints.close()


def restore(workdir: pathlib.Path) -> TrainState | None:
    checkpoints = Checkpoints(workdir, keep=5)
    try:
        return checkpoints.restore(fresh())
    finally:
        checkpoints.close()


def assert_is(state: TrainState, step: int) -> None:
    wanted = state_at(step)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for got, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == leaf.dtype
        np.testing.assert_array_equal(got, leaf)


def flip_a_bit(directory: pathlib.Path) -> None:
    """In the middle of the largest file, where the numbers of the largest leaves are."""
    largest = max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x10
    largest.write_bytes(content)


@pytest.fixture
def errors(monkeypatch) -> list[str]:
    """What is logged as an error."""
    lines = []
    monkeypatch.setattr(
        "gkdjax.train.checkpoint.logging.error", lambda text, *args: lines.append(text % args)
    )
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
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [
        "2",
        "3",
    ]


def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_used(tmp_path, errors):
    save(tmp_path, 5, 6)
    flip_a_bit(tmp_path / "checkpoints" / "6")
    assert_is(restore(tmp_path), 5)
    assert len(errors) == 1
    assert "checkpoint 6" in errors[0]
    assert any(f"{path}/{half}" in errors[0] for path in fresh().trainable for half in "ab")


def test_an_empty_directory_of_a_later_step_fools_nobody(tmp_path, errors):
    save(tmp_path, 5)
    (tmp_path / "checkpoints" / "99").mkdir()
    assert_is(restore(tmp_path), 5)


@pytest.mark.parametrize("damage", ["flipped bit", "empty directory"])
def test_a_run_that_passed_over_damage_goes_on_saving(tmp_path, errors, damage):
    """Steps up to and past the damaged one are saved anew, and then found."""
    save(tmp_path, 5, 7)
    if damage == "flipped bit":
        flip_a_bit(tmp_path / "checkpoints" / "7")
    else:
        (tmp_path / "checkpoints" / "99").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=5)
    first = 5 if damage == "flipped bit" else 7
    assert_is(checkpoints.restore(fresh()), first)
    checkpoints.save(state_at(first + 1))
    checkpoints.save(state_at(first + 2))
    checkpoints.wait()
    checkpoints.close()
    errors.clear()
    assert_is(restore(tmp_path), first + 2)
    assert errors == []


def test_nothing_whole_is_an_error_and_not_a_new_start(tmp_path, errors):
    save(tmp_path, 5, 6)
    for step in ("5", "6"):
        flip_a_bit(tmp_path / "checkpoints" / step)
    with pytest.raises(UserError, match=r"none of the checkpoints \[6, 5\]"):
        restore(tmp_path)
    assert len(errors) == 2
    # Told apart from the damage: nothing was thrown away.
    assert {"5", "6"} <= {p.name for p in (tmp_path / "checkpoints").iterdir()}


def test_a_fingerprint_sees_each_number_and_its_place_but_not_the_mesh():
    mesh = parallel_mesh.make_mesh(fsdp=2, tensor=2)
    numbers = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)

    def found(x):
        return checkpoint._fingerprints({"x": x})["x"]

    whole = found(numbers)
    for cut in (("fsdp",), (None, "tensor"), ("fsdp", "tensor")):
        placed = jax.device_put(numbers, NamedSharding(mesh, PartitionSpec(*cut)))
        assert found(placed) == whole
    assert found(numbers.reshape(6, 4)) == whole  # of the same shape it is by the checkpoint's
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
        layout = ShardingRules.of(parallel_mesh.make_mesh(**sizes), DECODER.spec)
        return jax.device_put(state, layout.shardings_of(state))

    checkpoints = Checkpoints(tmp_path, keep=5)
    checkpoints.save(placed(state_at(5), fsdp=2))
    checkpoints.wait()
    like = placed(fresh(), tensor=2)
    state = checkpoints.restore(like)
    checkpoints.close()
    assert_is(state, 5)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == wanted.sharding
    assert errors == []
