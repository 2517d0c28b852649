"""Which meshes fit, and what to change if none is named or the run is too large."""

import logging

import pytest
from planning_setups import setup

from gkdjax.train.planning import advice, memory

FULL = {"student__adapter": "none", "teacher__backend": "flax"}
OF_EIGHT = {"devices": 8, "train__batch_size": 64, "train__remat": True} | FULL
LARGE = 10**15  # bytes: all fits


def peak(**changes) -> int:
    return memory.plan(setup(**OF_EIGHT | changes)).peak


def test_no_axis_is_sharded_where_all_fits(caplog):
    with caplog.at_level(logging.WARNING):
        found = advice.meshes(setup(**OF_EIGHT), LARGE)
    assert caplog.text == ""  # of heads that some of them keep whole
    assert found.best == ({}, peak())
    # Four heads are not cut by eight.
    assert (found.tried, len(found.fitting), found.refused) == (10, 9, {"layers/q_proj": 1})


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


def test_where_one_axis_is_not_enough_two_are_sharded():
    limit = min(peak(mesh__fsdp=8), peak(mesh__tensor=4)) - 1
    best = advice.meshes(setup(**OF_EIGHT), limit).best
    assert best == ({"mesh.fsdp": 4, "mesh.tensor": 2}, peak(mesh__fsdp=4, mesh__tensor=2))


def test_a_config_with_a_mesh_is_told_what_leads_to_another():
    of = setup(mesh__data=2, mesh__tensor=4, **OF_EIGHT)
    assert advice.meshes(of, LARGE).best.settings == {"mesh.data": -1, "mesh.tensor": 1}


@pytest.mark.parametrize("mesh", [{"mesh__dcn_data": 2}, {"mesh__data": 4, "mesh__dcn_data": -1}])
def test_slices_stay_as_many_as_there_are(mesh):
    found = advice.meshes(setup(**mesh, **OF_EIGHT), LARGE)
    assert found.tried == 6 and found.best.settings == {}


def test_rows_that_cannot_be_shared_are_counted():
    of = setup(**OF_EIGHT | {"train__batch_size": 4, "mesh__tensor": 2})
    assert advice.meshes(of, LARGE).refused == {"config.train.batch_size": 4, "layers/q_proj": 1}


def test_where_nothing_fits_no_mesh_is_best():
    found = advice.meshes(setup(**OF_EIGHT), 1000)
    assert found.best is None and found.fitting == []


def test_advice_begins_with_the_mesh_if_the_config_has_none():
    of, limit = setup(**OF_EIGHT), peak() - 1
    best = advice.meshes(of, limit).best
    first, *others = advice.changes(of, limit, best)
    assert first == (best.settings, peak() - best.peak) and others
    assert not any("mesh" in key for change in others for key in change.settings)


@pytest.mark.parametrize("mesh", [{"mesh__fsdp": 2}, {"mesh__data": 4, "mesh__fsdp": 2}])
def test_more_of_an_axis_is_a_change_where_the_others_leave_room(mesh):
    of = setup(**OF_EIGHT | mesh)
    assert ("mesh.tensor" in settings(of, 0)) == ("mesh__data" not in mesh)


def test_a_change_saves_what_the_peak_loses():
    of = setup(train__batch_size=16)
    before = memory.plan(of).peak
    found = advice.changes(of, 0, None)
    assert 0 < len(found) <= 3
    assert [c.saves for c in found] == sorted((c.saves for c in found), reverse=True)
    remat = next(c for c in found if c.settings == {"train.remat": True})
    assert remat.saves == before - memory.plan(setup(train__batch_size=16, train__remat=True)).peak


def settings(of, limit) -> dict:
    """All changes together, in their order."""
    changes = advice.changes(of, limit, None)
    return {key: value for change in changes for key, value in change.settings.items()}


def test_a_number_is_lowered_no_further_than_it_must_be():
    of = setup(train__batch_size=16)
    limit = memory.plan(setup(train__batch_size=16, train__grad_accum_steps=4)).peak
    assert settings(of, limit)["train.grad_accum_steps"] == 4


def test_what_is_done_already_or_saves_nothing_is_not_proposed():
    """All memory is the optimizer's: activations, heads and teachers are not the matter."""
    of = setup(
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
    assert settings(of, 0).keys() <= {"student.adapter", "student.compute_dtype"}
    assert next(iter(settings(of, 0))) == "student.adapter"


def test_an_anchor_is_cut_in_as_many_parts_as_the_batch():
    of = setup(train__batch_size=16, anchor__data=[{"prompt": "?"}], anchor__batch_size=6)
    assert settings(of, 0)["train.grad_accum_steps"] == 2
