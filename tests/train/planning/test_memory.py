"""Bytes that can be counted by hand. The training step as a whole: tests/benchmarks."""

import dataclasses

import pytest
from planning_setups import TEACHER, setup

from gkdjax.train.planning import memory
from gkdjax.train.planning.memory import held, kv_bytes, lower_bound, total
from gkdjax.utils.errors import UserError


def test_lora_holds_a_frozen_base_and_the_optimizer_of_the_adapters():
    of = setup(dtype="bfloat16", student__compute_dtype="bfloat16")
    # All seven kernels of six layers, rank 64: (in + out) * 64 numbers each.
    ends = (256 + 256) + 2 * (256 + 64) + (256 + 256) + 3 * (256 + 1024)
    adapters = 6 * 64 * ends * 4
    found = held(of)
    assert found["adapters"] == adapters and found["optimizer state"] == 2 * adapters
    assert found["student, frozen"] == parameters() * 2
    assert "teacher" not in found  # it is the base
    assert lower_bound(of)["student, as loaded"] == parameters() * 2


def parameters() -> int:
    """Counts the student's: kernels, norms, table."""
    kernels = 256 * 256 * 2 + 256 * 64 * 2 + 3 * 256 * 1024
    norms = 4 * 256 + 2 * 64
    return 6 * (kernels + norms) + 256 + 4096 * 256


def test_full_fine_tuning_holds_masters_and_a_copy_only_for_who_reads_it():
    of = setup("bfloat16", student__adapter="none", teacher__backend="flax")
    found = held(of)
    assert found["student, float32"] == parameters() * 4
    assert found["optimizer state"] == parameters() * 8
    assert "student, frozen second copy" not in found
    toggling = held(setup("bfloat16", student__adapter="none"))
    assert toggling["student, frozen second copy"] == parameters() * 2
    anchored = {"anchor__data": [{"prompt": "?"}], "teacher__backend": "flax"}
    found = held(setup("bfloat16", student__adapter="none", **anchored))
    assert found["student, frozen second copy"] == parameters() * 2
    found = held(
        setup("bfloat16", student__adapter="none", anchor__reference="teacher", **anchored)
    )
    assert "student, frozen second copy" not in found


def test_the_masters_begin_beside_what_was_loaded():
    of = setup("bfloat16", student__adapter="none", teacher__backend="flax")
    assert total(lower_bound(of)) == parameters() * (2 + 4 + 8) + of.teacher.nbytes(None)


def test_dtypes_of_the_config_win_over_the_checkpoints():
    changes = {"student__dtype": "bfloat16", "teacher__dtype": "bfloat16"}
    of = setup("float32", teacher__backend="flax", **changes)
    assert lower_bound(of)["student, as loaded"] == parameters() * 2
    assert lower_bound(of)["teacher"] * 2 == of.teacher.nbytes(None)


def test_keys_and_values_of_local_layers_are_as_many_as_the_window():
    bfloat16 = setup(student__compute_dtype="bfloat16")
    assert kv_bytes(setup(), setup().of_student, 100) == 2 * 64 * 6 * 100 * 4
    assert kv_bytes(bfloat16, bfloat16.of_student, 1000) == 2 * 64 * (1 * 1000 + 5 * 512) * 2
    whole = dataclasses.replace(setup().of_student, spec=dataclasses.replace(TEACHER, window=None))
    assert kv_bytes(setup(), whole, 9) == 2 * 64 * 12 * 9 * 4


def test_a_prefix_of_all_rows_is_one_and_rows_of_their_own_have_the_limit():
    one = held(setup(teacher__prefix_bytes=10**9))["teacher's prefixes, at most"]
    assert one == kv_bytes(setup(), setup().of_student, 128)
    own = setup(teacher__prefix_bytes=10**9, context__prefix_messages=())
    assert held(own)["teacher's prefixes, at most"] == 10**9


def test_a_server_takes_no_memory_here():
    changes = {"teacher__backend": "vllm", "teacher__api_base": "http://127.0.0.1:1/v1"}
    of = setup(**changes)
    assert not any("teacher" in part for part in held(of))
    assert memory.teacher_forward(of) == {} and memory.sampling(of) == {}
    assert memory.sampling(setup(gkd__on_policy_fraction=0.5, **changes)) != {}


@pytest.mark.parametrize("phase", [memory.training_step, memory.teacher_forward, memory.evaluation])
def test_devices_share_what_grows_with_the_rows(phase):
    """The head's chunk and what is whole on each device are left out."""
    whole = ("head", "gradients", "student", "tables")

    def size(devices):
        found = phase(setup(devices=devices, train__batch_size=8))
        return sum(n for part, n in found.items() if not part.startswith(whole))

    layer = (256 * 256 * 2 + 256 * 64 * 2 + 3 * 256 * 1024 + 4 * 256 + 2 * 64) * 4
    assert size(4) - layer == pytest.approx((size(1) - layer) / 4, rel=0.01)


def test_less_is_kept_with_remat_and_with_parts():
    def activations(**changes):
        return memory.training_step(setup(train__batch_size=8, **changes))["activations"]

    plain = activations()
    assert activations(train__remat=True) < plain / 10
    assert activations(train__grad_accum_steps=4) == pytest.approx(plain / 4, rel=0.02)


def test_weights_of_another_dtype_than_the_products_are_cast_and_kept():
    """A frozen kernel in bfloat16 is needed in float32 by the backward pass."""
    same = memory.training_step(setup("float32"))
    cast = memory.training_step(setup("bfloat16"))
    kernels = 6 * (256 * 256 * 2 + 256 * 64 * 2 + 3 * 256 * 1024) * 4
    assert cast["activations"] - same["activations"] == kernels
    assert cast["tables"] - same["tables"] == 4096 * 256 * 4


def test_casts_of_weights_that_the_mesh_cuts_are_made_again():
    def activations(dtype, **mesh):
        of = setup(dtype, devices=4, train__batch_size=8, **mesh)
        return memory.training_step(of)["activations"]

    kernels = 6 * (256 * 256 * 2 + 256 * 64 * 2 + 3 * 256 * 1024) * 4
    assert activations("bfloat16") - activations("float32") == kernels
    assert activations("bfloat16", mesh__fsdp=4) == activations("float32", mesh__fsdp=4)


def test_a_recomputed_layer_holds_random_words_and_what_dropout_left():
    def one_layer(dropout):
        of = setup(train__batch_size=8, train__remat=True)
        object.__setattr__(of.config.student.lora, "dropout", dropout)
        return memory.training_step(of)["one layer's backward pass"]

    inputs = 5 * 256 + 4 * 64 + 1024
    # Two words and a bool for each; q, k and v read one array without it, and gate and up another.
    expected = 8 * 128 * (9 * inputs + 3 * 256 * 4)
    assert one_layer(0.5) - one_layer(0.0) == expected


def test_phases_do_not_add_up():
    made = memory.plan(setup(train__batch_size=8))
    sizes = [total(parts) for parts in made.phases.values()]
    assert len(sizes) == 4 and made.peak == total(made.held) + max(sizes)
    assert made.least < total(made.held) < made.peak


def test_rows_that_the_devices_cannot_share_are_refused_as_the_run_does():
    message = r"config\.train\.batch_size: 6 rows at once cannot be shared by 4 devices; .* 8"
    with pytest.raises(UserError, match=message):
        memory.plan(setup(devices=4, train__batch_size=6))


def test_adapters_that_fit_no_kernel_are_refused():
    of = setup()
    lora = of.config.student.lora
    object.__setattr__(lora, "targets", ("no_proj",))
    with pytest.raises(UserError, match=r"config\.student\.lora\.targets: .*no_proj"):
        memory.plan(of)
