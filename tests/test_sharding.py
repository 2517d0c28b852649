"""One mesh over the local devices; conftest.py makes four of them."""

import jax
import numpy as np
import pytest

from gkdjax import sharding
from gkdjax.errors import UserError


@pytest.fixture
def mesh():
    return sharding.data_mesh()


def test_the_mesh_is_all_local_devices_in_auto_mode(mesh):
    assert (mesh.axis_names, mesh.size) == (("data",), 4)
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)


def test_rows_are_cut_and_parameters_are_not(mesh):
    rows = sharding.shard_rows(mesh, {"x": np.arange(24).reshape(8, 3)})["x"]
    assert [shard.data.tolist() for shard in rows.addressable_shards][1] == [[6, 7, 8], [9, 10, 11]]
    whole = sharding.replicate(mesh, {"w": np.arange(6).reshape(2, 3), "step": np.int32(1)})
    assert whole["w"].sharding.is_fully_replicated
    assert len(whole["step"].addressable_shards) == 4
    assert whole["w"].addressable_shards[3].data.shape == (2, 3)


@pytest.mark.parametrize("rows, wanted", [(1, 4), (6, 8), (9, 12)])
def test_rows_that_cannot_be_shared_are_refused_with_a_number_that_can(mesh, rows, wanted):
    for good in (4, 8):
        sharding.check_rows(mesh, "train.batch_size", good)
    with pytest.raises(UserError, match=rf"config.train.batch_size: {rows} .* can is {wanted}$"):
        sharding.check_rows(mesh, "train.batch_size", rows)
