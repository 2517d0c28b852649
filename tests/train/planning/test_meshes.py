"""The best mesh, and that it is the first thing to change."""

import logging

import pytest
from planning_setups import setup

from gkdjax.train.planning import advice, chips, meshes, plan, text

H100 = chips.named("8xH100").chip
FULL = {"student__adapter": "none", "teacher__backend": "flax"}
OF_EIGHT = {"devices": 8, "train__batch_size": 8, "train__remat": True} | FULL


def of_size(limit: int) -> chips.Chip:
    """With so many bytes that can be used."""
    return H100._replace(hbm_bytes=limit / (1 - chips.RESERVE))


def peak(**changes) -> int:
    return plan.make(setup(**OF_EIGHT | changes)).peak


def test_where_all_fits_data_alone_is_fastest(caplog):
    with caplog.at_level(logging.WARNING):
        choice = meshes.choose(setup(**OF_EIGHT), H100)
    assert caplog.text == ""  # of heads that some of them keep whole
    assert choice.best.settings == {} and choice.best.peak == peak()
    # Four heads are not cut by eight.
    assert (choice.tried, choice.fitting, choice.refused) == (10, 9, {"layers/q_proj": 1})
    assert text.best_mesh(choice).startswith("best mesh: this one: ")


def test_weights_are_cut_where_they_must_be():
    """Of three meshes that fit, the fastest: not the one that takes least memory."""
    most = peak(mesh__tensor=2)
    choice = meshes.choose(setup(**OF_EIGHT), of_size(most))
    assert choice.best.settings == {"mesh.tensor": 2} and choice.best.peak == most
    assert choice.fitting == 3 and peak(mesh__tensor=4) < most
    told = text.best_mesh(choice)
    assert told.startswith("best mesh: --config.mesh.tensor=2: ")
    assert told.endswith("3 of 10 meshes of these devices fit; 1 do not divide layers/q_proj")


def test_a_config_with_a_mesh_is_told_what_leads_to_another():
    of = setup(mesh__data=2, mesh__tensor=4, **OF_EIGHT)
    assert meshes.choose(of, H100).best.settings == {"mesh.data": -1, "mesh.tensor": 1}


def test_slices_stay_as_many_as_there_are():
    choice = meshes.choose(setup(mesh__dcn_data=2, **OF_EIGHT), H100)
    assert choice.tried == 6 and choice.best.settings == {}
    choice = meshes.choose(setup(mesh__data=4, mesh__dcn_data=-1, **OF_EIGHT), H100)
    assert choice.tried == 6 and choice.best.settings == {}


def test_rows_that_cannot_be_shared_are_counted():
    choice = meshes.choose(setup(**OF_EIGHT | {"train__batch_size": 4, "mesh__tensor": 2}), H100)
    assert choice.refused == {"config.train.batch_size": 4, "layers/q_proj": 1}


def test_where_nothing_fits_no_mesh_is_best():
    choice = meshes.choose(setup(**OF_EIGHT), of_size(1000))
    assert choice.best is None and choice.fitting == 0
    assert text.best_mesh(choice).startswith("best mesh: none; 0 of 10 meshes")


def test_advice_begins_with_the_mesh_if_the_config_has_none():
    of, most = setup(**OF_EIGHT), peak(mesh__tensor=2)
    best = meshes.choose(of, of_size(most)).best
    first, *others = advice.changes(of, most, best)
    assert first.settings == {"mesh.tensor": 2} and first.saves == peak() - most
    assert others
    assert not any("mesh" in key for change in others for key in change.settings)
    assert "--config.mesh.tensor=2" in text.advice([first, *others])


@pytest.mark.parametrize("mesh", [{"mesh__fsdp": 2}, {"mesh__data": 4, "mesh__fsdp": 2}])
def test_more_of_an_axis_is_a_change_where_the_others_leave_room(mesh):
    of = setup(**OF_EIGHT | mesh)
    found = {key: v for c in advice.changes(of, 0, None) for key, v in c.settings.items()}
    assert ("mesh.tensor" in found) == ("mesh__data" not in mesh)
