"""Bytes that can be counted by hand. The training step as a whole: tests/benchmarks."""

import dataclasses

import pytest
from planning_setups import TEACHER, setup

from gkdjax.train.planning import memory
from gkdjax.train.planning.memory import held, kv_bytes, lower_bound, total
from gkdjax.utils.errors import UserError

KERNELS = 256 * 256 * 2 + 256 * 64 * 2 + 3 * 256 * 1024  # of a layer
NORMS = 4 * 256 + 2 * 64
PARAMETERS = 6 * (KERNELS + NORMS) + 256 + 4096 * 256  # the student's
FULL = {"student__adapter": "none"}
FLAX = {"teacher__backend": "flax"}
SERVER = {"teacher__backend": "vllm", "teacher__api_base": "http://127.0.0.1:1/v1"}
ANCHORED = {"anchor__data": [{"prompt": "?"}]}


def test_lora_holds_a_frozen_base_and_the_optimizer_of_the_adapters():
    inputs = setup(dtype="bfloat16", student__compute_dtype="bfloat16")
    # All seven kernels of six layers, rank 64: (in + out) * 64 numbers each.
    ends = (256 + 256) + 2 * (256 + 64) + (256 + 256) + 3 * (256 + 1024)
    adapters = 6 * 64 * ends * 4
    found = held(inputs)
    assert found["adapters"] == adapters and found["optimizer state"] == 2 * adapters
    assert found["student, frozen"] == lower_bound(inputs)["student, as loaded"] == PARAMETERS * 2
    assert "teacher" not in found  # it is the base


@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        (FLAX, 0),
        ({}, 1),
        (FLAX | ANCHORED, 1),
        (FLAX | ANCHORED | {"anchor__reference": "teacher"}, 0),
    ],
)
def test_full_fine_tuning_holds_masters_and_a_copy_only_if_it_is_read(changes, copies):
    inputs = setup("bfloat16", **FULL, **changes)
    found = held(inputs)
    assert found["student, float32"] == PARAMETERS * 4
    assert found["optimizer state"] == PARAMETERS * 8
    assert found.get("student, frozen second copy") == (PARAMETERS * 2 if copies else None)
    # The masters begin beside what was loaded.
    teacher = inputs.teacher.nbytes(None) if changes else 0
    assert total(lower_bound(inputs)) == PARAMETERS * (2 + 4 + 8) + teacher


def test_dtypes_of_the_config_win_over_the_checkpoints():
    changes = {"student__dtype": "bfloat16", "teacher__dtype": "bfloat16"}
    inputs = setup("float32", **FLAX, **changes)
    assert lower_bound(inputs)["student, as loaded"] == PARAMETERS * 2
    assert lower_bound(inputs)["teacher"] * 2 == inputs.teacher.nbytes(None)


def test_keys_and_values_of_local_layers_are_as_many_as_the_window():
    bfloat16 = setup(student__compute_dtype="bfloat16")
    assert kv_bytes(setup(), setup().of_student, 100) == 2 * 64 * 6 * 100 * 4
    assert kv_bytes(bfloat16, bfloat16.of_student, 1000) == 2 * 64 * (1 * 1000 + 5 * 512) * 2
    whole = dataclasses.replace(setup().of_student, spec=dataclasses.replace(TEACHER, window=None))
    assert kv_bytes(setup(), whole, 9) == 2 * 64 * 12 * 9 * 4


def test_a_prefix_of_all_rows_is_one_and_rows_of_their_own_have_the_limit():
    shared = setup(teacher__prefix_bytes=10**9)
    own = setup(teacher__prefix_bytes=10**9, context__prefix_messages=())
    found = [held(inputs)["teacher's prefixes, at most"] for inputs in (shared, own)]
    assert found == [kv_bytes(setup(), setup().of_student, 128), 10**9]


def test_a_server_takes_no_memory_here():
    inputs = setup(**SERVER)
    assert not any("teacher" in part for part in held(inputs))
    assert memory.teacher_forward(inputs) == {} and memory.sampling(inputs) == {}
    assert memory.sampling(setup(gkd__on_policy_fraction=0.5, **SERVER)) != {}


@pytest.mark.parametrize("phase", [memory.training_step, memory.teacher_forward, memory.evaluation])
def test_devices_share_what_grows_with_the_rows(phase):
    """The head's chunk and what is replicated are left out."""

    def size(devices):
        found = phase(setup(devices=devices, train__batch_size=8))
        whole = ("head", "gradients", "student", "tables")
        return sum(n for part, n in found.items() if not part.startswith(whole))

    layer = (KERNELS + NORMS) * 4
    assert size(4) - layer == pytest.approx((size(1) - layer) / 4, rel=0.01)


def activations(dtype="float32", **changes):
    return memory.training_step(setup(dtype, train__batch_size=8, **changes))["activations"]


def test_less_is_kept_with_remat_and_with_micro_batches():
    plain = activations()
    assert activations(train__remat=True) < plain / 10
    assert activations(train__grad_accum_steps=4) == pytest.approx(plain / 4, rel=0.02)


def test_weights_of_another_dtype_than_the_products_are_cast_and_kept():
    """A frozen kernel in bfloat16 is needed in float32 by the backward pass, unless it is sharded:
    then it is cast again."""
    assert activations("bfloat16") - activations() == 6 * KERNELS * 4
    same, cast = (memory.training_step(setup(dtype)) for dtype in ("float32", "bfloat16"))
    assert cast["tables"] - same["tables"] == 4096 * 256 * 4
    assert activations("bfloat16", devices=4) - activations(devices=4) == 6 * KERNELS * 4
    mesh = {"devices": 4, "mesh__fsdp": 4}
    assert activations("bfloat16", **mesh) == activations(**mesh)


def test_a_recomputed_layer_holds_random_words_and_what_dropout_left():
    def one_layer(dropout):
        inputs = setup(train__batch_size=8, train__remat=True)
        object.__setattr__(inputs.config.student.lora, "dropout", dropout)
        return memory.training_step(inputs)["one layer's backward pass"]

    inputs = 5 * 256 + 4 * 64 + 1024
    # Two words and a bool for each; q, k and v read one array without it, and gate and up another.
    expected = 8 * 128 * (9 * inputs + 3 * 256 * 4)
    assert one_layer(0.5) - one_layer(0.0) == expected


def test_phases_do_not_add_up():
    made = memory.plan(setup(train__batch_size=8))
    sizes = [total(parts) for parts in made.phases.values()]
    assert len(sizes) == 4 and made.peak == total(made.held) + max(sizes)
    assert made.least < total(made.held) < made.peak


def test_rows_and_adapters_that_do_not_fit_are_refused_as_the_run_does():
    message = r"config\.train\.batch_size: 6 rows at once cannot be shared by 4 devices; .* 8"
    with pytest.raises(UserError, match=message):
        memory.plan(setup(devices=4, train__batch_size=6))
    inputs = setup()
    object.__setattr__(inputs.config.student.lora, "targets", ("no_proj",))
    with pytest.raises(UserError, match=r"config\.student\.lora\.targets: .*no_proj"):
        memory.plan(inputs)
