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


@pytest.mark.parametrize(
    ("limits", "allocator", "wanted"),
    [
        ([7, 5], None, 5),
        ([7, None], None, None),  # one that does not say is not judged
        ([7], "cuda_async", None),  # nor an allocator without a limit
    ],
)
def test_the_smallest_device_counts(monkeypatch, limits, allocator, wanted):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_ALLOCATOR", raising=False)
    if allocator:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", allocator)
    for unknown in (None, {}, {"bytes_in_use": 3}):
        stats = [unknown if n is None else {"bytes_limit": n} for n in limits]
        devices = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
        assert check.memory_limit(devices) == wanted


def test_a_run_that_cannot_fit_is_refused_with_the_plan_before_weights_are_read(
    student, tmp_path, monkeypatch
):
    monkeypatch.setattr(check, "memory_limit", lambda devices: 1000)
    monkeypatch.setattr(run, "assemble", None)  # calling it would be another error
    message = "(?s)this run cannot fit.*student, frozen.*optimizer state.*peak"
    with pytest.raises(UserError, match=message):
        gkdjax.run(small(student), tmp_path / "run")


def read(config, workdir, teacher=None) -> setup.RunInputs:
    with contextlib.ExitStack() as connections:
        return setup.read(parse(config), workdir, teacher, connections)


def test_a_run_that_may_not_fit_is_a_warning(student, tmp_path, monkeypatch, caplog):
    inputs = read(small(student, teacher__top_k=1), tmp_path, ConstantTeacher())
    monkeypatch.setattr(check, "memory_limit", lambda devices: 10**15)
    check.check_memory(inputs)
    assert caplog.text == ""
    least = memory.plan(check.plan_inputs(inputs)).least
    monkeypatch.setattr(check, "memory_limit", lambda devices: least)
    check.check_memory(inputs)
    assert "this run may not fit" in caplog.text and "student, frozen" in caplog.text
    monkeypatch.setattr(check, "memory_limit", lambda devices: least - 1)
    with pytest.raises(UserError, match="cannot fit"):
        check.check_memory(inputs)


@pytest.mark.parametrize("mesh", [{}, {"mesh__fsdp": 2, "mesh__tensor": 2}])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_lower_bound_is_what_is_there_when_the_first_step_begins(
    adapter, mesh, student, other, tmp_path
):
    """Counted from one device's part of the arrays themselves: base, teacher, state."""
    models = {"teacher__backend": "flax", "teacher__model": other, "student__adapter": adapter}
    inputs = read(small(student, **models, **mesh), tmp_path)
    least = memory.plan(check.plan_inputs(inputs)).least
    made = setup.assemble(inputs, tmp_path)
    state = setup.initial_state(made, optimizer.optimizer(inputs.config.optim, 1))
    trees = (made.base, made.teacher.params, state.trainable, state.opt_state)
    there = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(trees))
    assert least <= there < least + 100  # counters of the optimizer
