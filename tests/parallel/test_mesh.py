"""One mesh over all devices, and the rows that they share; conftest.py makes four of them."""

import jax
import numpy as np
import pytest

from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.utils.errors import UserError


@pytest.fixture
def mesh():
    return parallel_mesh.make_mesh()


def test_the_mesh_is_all_devices_in_auto_mode(mesh):
    assert (mesh.axis_names, mesh.size) == (("data", "fsdp", "tensor"), 4)
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 3


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
    assert parallel_mesh.make_mesh(**sizes).devices.shape == wanted


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (
            {"fsdp": 2, "tensor": 3},
            r"fsdp=2 \* tensor=3 needs a multiple of 6 devices, and there are 4; take data=2,"
            " fsdp=2, tensor=1, dcn_data=1",
        ),
        ({"data": 8}, "data=8 needs 8 devices, and there are 4; take data=4,"),
        ({"data": 1, "fsdp": 2}, "fsdp=2 needs 2 devices, and there are 4; take data=2, fsdp=2"),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_an_error(sizes, told):
    with pytest.raises(UserError, match=told):
        parallel_mesh.make_mesh(**sizes)


class _Slices:
    """Devices of two slices of two, as a TPU has them."""

    platform = device_kind = "tpu of a test"

    def __init__(self, number):
        self.id, self.slice_index, self.process_index = number, number % 2, 0
        self.coords, self.core_on_chip = (number // 2, 0, 0), 0

    def __repr__(self):
        return f"d{self.id}"


def test_slices_lie_one_after_the_other_along_data(monkeypatch):
    placed = []
    monkeypatch.setattr(parallel_mesh, "Mesh", lambda grid, *_, **__: placed.append(grid))
    devices = [_Slices(number) for number in range(4)]
    parallel_mesh.make_mesh(dcn_data=2, tensor=2, data=1, devices=devices)
    assert [[d.slice_index for d in row.flat] for row in placed[0]] == [[0, 0], [1, 1]]
    with pytest.raises(UserError, match=r"mesh.dcn_data = 4: the devices are in 2 slices"):
        parallel_mesh.make_mesh(dcn_data=4, devices=devices)


def test_processes_are_the_slices_of_devices_that_have_none():
    with pytest.raises(UserError, match=r"mesh.dcn_data = 2: the devices are in 1 processes"):
        parallel_mesh.make_mesh(dcn_data=2)


def test_rows_are_cut_and_parameters_are_not(mesh):
    rows = parallel_mesh.shard_rows(mesh, {"x": np.arange(24).reshape(8, 3)})["x"]
    assert [shard.data.tolist() for shard in rows.addressable_shards][1] == [[6, 7, 8], [9, 10, 11]]
    whole = parallel_mesh.replicate(mesh, {"w": np.arange(6).reshape(2, 3), "step": np.int32(1)})
    assert whole["w"].sharding.is_fully_replicated
    assert len(whole["step"].addressable_shards) == 4
    assert whole["w"].addressable_shards[3].data.shape == (2, 3)


@pytest.mark.parametrize("rows, wanted", [(1, 4), (6, 8), (9, 12)])
def test_rows_that_cannot_be_shared_are_refused_with_a_number_that_can(mesh, rows, wanted):
    for good in (4, 8):
        parallel_mesh.check_rows(mesh, "train.batch_size", good)
    with pytest.raises(UserError, match=rf"config.train.batch_size: {rows} .* can is {wanted}$"):
        parallel_mesh.check_rows(mesh, "train.batch_size", rows)


def test_data_and_fsdp_share_rows_and_tensor_does_not():
    mesh = parallel_mesh.make_mesh(fsdp=2, tensor=2)
    assert parallel_mesh.row_shares(mesh) == 2
    rows = parallel_mesh.shard_rows(mesh, np.arange(6))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(3,)}
    with pytest.raises(UserError, match="by 4 devices"):
        parallel_mesh.check_rows(parallel_mesh.make_mesh(fsdp=2), "train.batch_size", 6)


def test_what_is_cut_comes_back_whole(mesh):
    rows = np.arange(24).reshape(8, 3)
    found = parallel_mesh.fetch({"x": parallel_mesh.shard_rows(mesh, rows), "y": rows[0], "z": 3})
    np.testing.assert_array_equal(found["x"], rows)
    assert parallel_mesh.holders(mesh, 8) == [[0]] * 8
