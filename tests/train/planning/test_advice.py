"""Which meshes fit, what to change if the run is too large, and the names of devices."""

import logging

import pytest
from planning_setups import setup

from gkdjax.train.planning import advice, chips, memory
from gkdjax.utils.errors import UserError

FULL = {"student__adapter": "none", "teacher__backend": "flax"}
OF_EIGHT = {"devices": 8, "train__batch_size": 64, "train__remat": True} | FULL
LARGE = 10**15  # bytes: all fits


def peak(**changes) -> int:
    return memory.plan(setup(**OF_EIGHT | changes)).peak


def settings(inputs, limit) -> dict:
    """All changes together, in their order."""
    changes = advice.changes(inputs, limit, None)
    return {key: value for change in changes for key, value in change.settings.items()}


def test_no_axis_is_sharded_where_all_fits_and_no_mesh_is_best_where_none_does(caplog):
    with caplog.at_level(logging.WARNING):
        found = advice.meshes(setup(**OF_EIGHT), LARGE)
    assert caplog.text == ""  # about heads that some meshes replicate
    assert found.best == ({}, peak())
    # Four heads are not divided by eight.
    assert (found.tried, len(found.fitting), found.refused) == (10, 9, {"layers/q_proj": 1})
    found = advice.meshes(setup(**OF_EIGHT), 1000)
    assert found.best is None and found.fitting == []


def test_the_fewest_axes_are_sharded_and_then_the_least_memory_is_taken():
    """Meshes of two sharded axes take less memory, and come after all of one."""
    found = advice.meshes(setup(**OF_EIGHT), peak() - 1)
    kinds = [len(each.settings) for each in found.fitting]
    assert kinds == sorted(kinds) and set(kinds) == {1, 2}
    one = [each.peak for each in found.fitting if len(each.settings) == 1]
    assert one == sorted(one) and found.best.peak == one[0] > min(e.peak for e in found.fitting)
    for each in found.fitting:
        sizes = {key.replace(".", "__"): size for key, size in each.settings.items()}
        assert each.peak == peak(**sizes) < peak()
    limit = min(peak(mesh__fsdp=8), peak(mesh__tensor=4)) - 1  # one axis is not enough
    best = advice.meshes(setup(**OF_EIGHT), limit).best
    assert best == ({"mesh.fsdp": 4, "mesh.tensor": 2}, peak(mesh__fsdp=4, mesh__tensor=2))


@pytest.mark.parametrize(
    ("changes", "tried", "best", "refused"),
    [
        (
            {"mesh__data": 2, "mesh__tensor": 4},
            10,
            {"mesh.data": -1, "mesh.tensor": 1},
            {"layers/q_proj": 1},
        ),
        # Slices stay as many as there are.
        ({"mesh__dcn_data": 2}, 6, {}, {}),
        ({"mesh__data": 4, "mesh__dcn_data": -1}, 6, {}, {}),
        (
            {"train__batch_size": 4, "mesh__tensor": 2},
            10,
            {"mesh.tensor": 4},
            {"config.train.batch_size": 4, "layers/q_proj": 1},
        ),
    ],
)
def test_settings_lead_from_the_configs_mesh_to_the_best(changes, tried, best, refused):
    found = advice.meshes(setup(**OF_EIGHT | changes), LARGE)
    assert (found.tried, found.best.settings, found.refused) == (tried, best, refused)


def test_advice_begins_with_the_mesh_if_the_config_has_none():
    inputs, limit = setup(**OF_EIGHT), peak() - 1
    best = advice.meshes(inputs, limit).best
    first, *others = advice.changes(inputs, limit, best)
    assert first == (best.settings, peak() - best.peak) and others
    assert not any("mesh" in key for change in others for key in change.settings)


@pytest.mark.parametrize("mesh", [{"mesh__fsdp": 2}, {"mesh__data": 4, "mesh__fsdp": 2}])
def test_more_of_an_axis_is_a_change_where_the_others_leave_room(mesh):
    found = settings(setup(**OF_EIGHT | mesh), 0)
    assert ("mesh.tensor" in found) == ("mesh__data" not in mesh)


def test_a_change_saves_what_the_peak_loses():
    inputs = setup(train__batch_size=16)
    found = advice.changes(inputs, 0, None)
    assert 0 < len(found) <= 3
    assert [c.saves for c in found] == sorted((c.saves for c in found), reverse=True)
    remat = next(c for c in found if c.settings == {"train.remat": True})
    after = memory.plan(setup(train__batch_size=16, train__remat=True)).peak
    assert remat.saves == memory.plan(inputs).peak - after


def test_a_number_is_lowered_no_further_than_it_must_be():
    """An anchor's batch has to be divided, too."""
    inputs = setup(train__batch_size=16)
    limit = memory.plan(setup(train__batch_size=16, train__grad_accum_steps=4)).peak
    assert settings(inputs, limit)["train.grad_accum_steps"] == 4
    anchored = setup(train__batch_size=16, anchor__data=[{"prompt": "?"}], anchor__batch_size=6)
    assert settings(anchored, 0)["train.grad_accum_steps"] == 2


def test_a_change_that_is_made_already_or_saves_nothing_is_not_proposed():
    """All memory is the optimizer's: activations, heads and teachers are not the matter."""
    inputs = setup(
        "bfloat16",
        student__adapter="none",
        teacher__backend="vllm",
        teacher__api_base="http://127.0.0.1:1/v1",
        data__max_length=16,
        train__batch_size=1,
        train__remat=True,
        eval__batch_size=1,
        gkd__chunk_size=1,
    )
    first, *others = settings(inputs, 0)
    assert first == "student.adapter" and {*others} <= {"student.compute_dtype"}


@pytest.mark.parametrize(
    ("name", "count", "gigabytes"),
    [
        *(("1xH200", 1, 141), ("8xH100", 8, 80), ("H100", 1, 80), ("2xB200", 2, 180)),
        *(("v5e-8", 8, 16), ("v6e-8", 8, 32), ("4xcpu", 4, None)),
        ("v5p-32", 16, 95),  # counts two to a chip
        ("tpu7x-32", 32, 96),  # 16 chips of two devices
    ],
)
def test_a_name_has_a_number_of_devices_and_their_size(name, count, gigabytes):
    found = chips.named(name)
    assert (found.name, found.count, found.gigabytes) == (name, count, gigabytes)
    if gigabytes is None:
        assert found.hbm_bytes is None and found.usable_bytes is None
    else:
        assert found.usable_bytes == pytest.approx(0.9 * gigabytes * 1e9)


@pytest.mark.parametrize(
    "name", ["8xA100", "v4-8", "0xH100", "v5p-1", "v5e", "v5e-0", "", "H100-8"]
)
def test_an_unknown_name_is_answered_with_the_known_ones(name):
    with pytest.raises(UserError, match=rf"--chips={name}: .*8xH100.*8xcpu, v5e-8.*tpu7x-8"):
        chips.named(name)
