"""A run on devices that say how much memory they have."""

import contextlib
import types

import jax
import pytest
from small_runs import ConstantTeacher, small

import gkdjax
from gkdjax.config import parse
from gkdjax.train import optimizer, run, setup
from gkdjax.train.planning import check, memory
from gkdjax.utils.errors import UserError


def device(stats):
    return types.SimpleNamespace(memory_stats=lambda: stats)


def test_the_smallest_device_counts_and_one_that_does_not_say_is_not_judged(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_ALLOCATOR", raising=False)
    assert check.memory_limit([device({"bytes_limit": 7}), device({"bytes_limit": 5})]) == 5
    for stats in (None, {}, {"bytes_in_use": 3}):
        assert check.memory_limit([device({"bytes_limit": 7}), device(stats)]) is None


def test_an_allocator_without_a_wall_is_not_judged(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")
    assert check.memory_limit([device({"bytes_limit": 7})]) is None


def test_what_cannot_fit_is_refused_with_the_plan_before_weights_are_read(
    student, tmp_path, monkeypatch
):
    monkeypatch.setattr(check, "memory_limit", lambda devices: 1000)
    monkeypatch.setattr(run, "assemble", None)  # calling it would be another error
    with pytest.raises(UserError) as error:
        gkdjax.run(small(student), tmp_path / "run")
    assert error.value.exit_code == 2
    for part in ("this run cannot fit", "student, frozen", "optimizer state", "peak"):
        assert part in str(error.value)


def read(config, workdir, teacher=None) -> setup.RunInputs:
    workdir.mkdir()
    with contextlib.ExitStack() as connections:
        return setup.read(parse(config), workdir, teacher, connections)


def test_what_may_not_fit_is_a_warning(student, tmp_path, monkeypatch, caplog):
    rows = read(small(student, teacher__top_k=1), tmp_path / "run", ConstantTeacher(50, 5))
    monkeypatch.setattr(check, "memory_limit", lambda devices: 10**15)
    check.check_memory(rows)
    assert caplog.text == ""
    least = memory.plan(check.plan_inputs(rows)).least
    monkeypatch.setattr(check, "memory_limit", lambda devices: least)
    check.check_memory(rows)
    assert "this run may not fit" in caplog.text and "student, frozen" in caplog.text
    monkeypatch.setattr(check, "memory_limit", lambda devices: least - 1)
    with pytest.raises(UserError, match="cannot fit"):
        check.check_memory(rows)


@pytest.mark.parametrize("mesh", [{}, {"mesh__fsdp": 2, "mesh__tensor": 2}])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_lower_bound_is_what_is_there_when_the_first_step_begins(
    adapter, mesh, student, other, tmp_path
):
    """Counted from one device's part of the arrays themselves: base, teacher, state."""
    models = {"teacher__backend": "flax", "teacher__model": other, "student__adapter": adapter}
    c = small(student, **models, **mesh)
    rows = read(c, tmp_path / "run")
    least = memory.plan(check.plan_inputs(rows)).least
    parts = setup.assemble(rows, tmp_path / "run")
    state = setup.initial_state(parts, optimizer.optimizer(rows.config.optim, 1))
    trees = (parts.base, parts.teacher.params, state.trainable, state.opt_state)
    there = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(trees))
    assert least <= there < least + 100  # counters of the optimizer
