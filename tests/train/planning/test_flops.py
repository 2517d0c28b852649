"""Work of a step, counted by hand."""

import pytest
from planning_setups import setup

from gkdjax.train.planning import chips, flops

LAYERS = 6 * (256 * 256 * 2 + 256 * 64 * 2 + 3 * 256 * 1024)
TOKENS = 8 * 128
ATTENTION = 4 * 256 * 6 * 128  # of one token: no row is longer than a window
FORWARD = TOKENS * (2 * LAYERS + ATTENTION)
ADAPTERS = 6 * 64 * ((256 + 256) + 2 * (256 + 64) + (256 + 256) + 3 * (256 + 1024))


def step(**changes) -> dict[str, flops.Work]:
    of = setup(data__max_length=128, trajectory__max_new_tokens=16, **changes)
    return {work.name: work for work in flops.step(of)}


def test_the_forward_passes_read_all_rows():
    found = step()
    assert found["student, forward"].flops == FORWARD == found["teacher, forward"].flops
    assert "base for the anchor" not in found
    anchored = step(anchor__data=[{"prompt": "?"}], anchor__batch_size=8)
    assert anchored["student, forward"].flops == 2 * FORWARD
    assert anchored["base for the anchor"].flops == FORWARD
    assert step(teacher__backend="flax")["teacher, forward"].flops > 4 * FORWARD


def test_a_frozen_kernel_has_no_gradient_and_remat_reads_again():
    attention = TOKENS * ATTENTION
    assert step()["student, backward"].flops == FORWARD + attention + TOKENS * 6 * ADAPTERS
    full = step(student__adapter="none", teacher__backend="flax")["student, backward"].flops
    assert full == 2 * FORWARD
    again = step(student__adapter="none", teacher__backend="flax", train__remat=True)
    assert again["student, backward"].flops == 3 * FORWARD


def test_the_head_computes_the_targets_alone():
    # 8 rows of 16 targets: logits and their gradient, and the teacher's logits.
    assert step()["head"].flops == 2 * 8 * 16 * 4096 * 256 * 3


def test_devices_share_the_work():
    one, four = (flops.step(setup(devices=devices)) for devices in (1, 4))
    for whole, part in zip(one, four, strict=True):
        assert part.flops == pytest.approx(whole.flops / 4)


def test_devices_along_tensor_share_it_too_but_for_keys_and_values():
    one, four = (flops.step(setup(devices=n, mesh__tensor=n)) for n in (1, 4))
    student, part = one[0].flops, four[0].flops
    keys = 2 * TOKENS * 6 * 256 * 64 * 2
    assert part == (student - keys) / 4 + keys
    assert four[-1].name == "head" and four[-1].flops == one[-1].flops / 4


def test_writing_is_as_slow_as_the_weights_are_read():
    changes = {"gkd__on_policy_fraction": 0.5, "train__batch_size": 1}
    of = setup("bfloat16", student__compute_dtype="bfloat16", **changes)
    work = flops.step(of)[-1]
    assert work.bytes_read == pytest.approx(0.5 * 128 * of.student.nbytes(None), rel=0.02)
    h100 = chips.named("H100").chip
    assert flops.seconds(work, of, h100) > work.bytes_read / (h100.hbm_bytes_per_s * 0.6)
    assert flops.seconds(work, of, chips.named("cpu").chip) is None


def test_float32_products_take_twice_as_long():
    h100 = chips.named("H100").chip
    work = flops.Work("any", 1e12)
    slow, fast = (
        flops.seconds(work, setup(student__compute_dtype=dtype), h100)
        for dtype in ("float32", "bfloat16")
    )
    assert slow == 2 * fast == pytest.approx(2 * 1e12 / (989e12 * 0.4))
