"""One mesh over all devices, and the rows that they share; conftest.py makes four of them."""

import jax
import numpy as np
import pytest

from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.parallel.mesh import (
    check_rows,
    fetch,
    holders,
    make_mesh,
    replicate,
    row_shares,
    shard_rows,
)
from gkdjax.utils.errors import UserError


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ({}, (4, 1, 1)),
        ({"fsdp": 2}, (2, 2, 1)),
        ({"fsdp": 2, "tensor": 2}, (1, 2, 2)),
        ({"data": 2, "tensor": -1}, (2, 1, 2)),
        ({"data": 4}, (4, 1, 1)),
        ({"dcn_data": -1, "data": 4}, (4, 1, 1)),
    ],
)
def test_one_axis_has_what_the_others_leave(sizes, wanted):
    mesh = make_mesh(**sizes)
    assert (mesh.axis_names, mesh.devices.shape) == (("data", "fsdp", "tensor"), wanted)
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 3


class _Device:
    """A device of two slices of two, as a TPU has them."""

    platform = device_kind = "tpu of a test"

    def __init__(self, number):
        self.id, self.slice_index, self.process_index = number, number % 2, 0
        self.coords, self.core_on_chip = (number // 2, 0, 0), 0


SLICES = [_Device(number) for number in range(4)]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"fsdp": 2, "tensor": 3},
            r"fsdp=2 \* tensor=3 needs a multiple of 6 devices, and there are 4; take data=2,"
            " fsdp=2, tensor=1, dcn_data=1",
        ),
        ({"data": 8}, "data=8 needs 8 devices, and there are 4; take data=4,"),
        ({"data": 1, "fsdp": 2}, "fsdp=2 needs 2 devices, and there are 4; take data=2, fsdp=2"),
        ({"dcn_data": 4, "devices": SLICES}, "dcn_data = 4: the devices are in 2 slices"),
        ({"dcn_data": 2}, "mesh.dcn_data = 2: the devices are in 1 processes"),
    ],
)
def test_sizes_that_are_not_those_of_the_devices_are_an_error(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(**sizes)


def test_slices_lie_one_after_the_other_along_data(monkeypatch):
    grids = []
    monkeypatch.setattr(parallel_mesh, "Mesh", lambda grid, *_, **__: grids.append(grid))
    make_mesh(dcn_data=2, tensor=2, data=1, devices=SLICES)
    assert [[d.slice_index for d in row.flat] for row in grids[0]] == [[0, 0], [1, 1]]


def test_rows_are_cut_parameters_are_not_and_both_come_back_whole():
    mesh, x = make_mesh(), np.arange(24).reshape(8, 3)
    rows = shard_rows(mesh, {"x": x})["x"]
    assert [shard.data.tolist() for shard in rows.addressable_shards][1] == [[6, 7, 8], [9, 10, 11]]
    whole = replicate(mesh, {"w": x, "step": np.int32(1)})
    assert [shard.data.shape for shard in whole["w"].addressable_shards] == [(8, 3)] * 4
    assert len(whole["step"].addressable_shards) == 4
    found = fetch({"x": rows, "y": x[0], "z": 3})
    np.testing.assert_array_equal(found["x"], x)
    assert found["z"] == 3
    assert holders(mesh, 8) == [[0]] * 8


def test_data_and_fsdp_share_rows_and_tensor_does_not():
    mesh = make_mesh(fsdp=2, tensor=2)
    assert row_shares(mesh) == 2
    assert {shard.data.shape for shard in shard_rows(mesh, np.arange(6)).addressable_shards} == {
        (3,)
    }
    check_rows(mesh, "train.batch_size", 6)
    for rows, next_one in ((1, 4), (6, 8), (9, 12)):
        check_rows(make_mesh(fsdp=2), "train.batch_size", next_one)
        wanted = rf"config.train.batch_size: {rows} rows .* by 4 devices.* can is {next_one}$"
        with pytest.raises(UserError, match=wanted):
            check_rows(make_mesh(fsdp=2), "train.batch_size", rows)
