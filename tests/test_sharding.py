"""One mesh over the local devices; conftest.py makes four of them."""

import factories
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gkdjax import sharding
from gkdjax.errors import UserError
from gkdjax.models.spec import param_shapes


@pytest.fixture
def mesh():
    return sharding.data_mesh()


def test_the_mesh_is_all_local_devices_in_auto_mode(mesh):
    assert (mesh.axis_names, mesh.size) == (("data", "fsdp", "tensor"), 4)
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("fsdp", "tensor", "wanted"), [(1, 1, (4, 1, 1)), (2, 1, (2, 2, 1)), (2, 2, (1, 2, 2))]
)
def test_the_data_axis_has_what_the_others_leave(fsdp, tensor, wanted):
    assert sharding.make_mesh(fsdp, tensor).devices.shape == wanted


def test_devices_that_cannot_be_shared_out_are_an_error():
    with pytest.raises(UserError, match=r"fsdp=2 and tensor=3 needs a multiple of 6.* there are 4"):
        sharding.make_mesh(fsdp=2, tensor=3)


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


def test_only_the_data_axis_shares_rows():
    mesh = sharding.make_mesh(fsdp=2)
    sharding.check_rows(mesh, "train.batch_size", 6)
    rows = sharding.shard_rows(mesh, np.arange(6))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(3,)}


UNTIED = {"tie_word_embeddings": False}


@pytest.mark.parametrize("family", factories.FAMILIES)
def test_the_rules_cover_every_leaf_of_every_family(family):
    shapes = param_shapes(factories.spec(family, **UNTIED))
    found = sharding.param_shardings(sharding.make_mesh(2, 2), shapes)
    assert found.keys() == shapes.keys()
    whole = {path for path, place in found.items() if place.is_fully_replicated}
    assert whole == {path for path in shapes if path.endswith("norm")}


def test_what_is_cut_how():
    shapes = param_shapes(factories.spec("qwen2", **UNTIED))
    found = sharding.param_shardings(sharding.make_mesh(2, 2), shapes)
    into, out = PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")
    specs = {path: place.spec for path, place in found.items()}
    assert specs["embedding"] == specs["unembedding"] == PartitionSpec("tensor", "fsdp")
    assert specs["layers/k_proj"] == specs["layers/up_proj"] == into
    assert specs["layers/o_proj"] == specs["layers/down_proj"] == out
    assert specs["layers/v_bias"] == PartitionSpec(None, "tensor")
    assert specs["final_norm"] == specs["layers/attn_norm"] == PartitionSpec()


def test_a_leaf_without_a_rule_is_named():
    with pytest.raises(ValueError, match="'layers/router'"):
        sharding.param_shardings(sharding.make_mesh(), {"layers/router": (2, 4, 4)})


def test_a_dimension_that_does_not_divide_is_named():
    shapes = {"final_norm": (6,), "layers/q_proj": (2, 6, 12)}
    sharding.param_shardings(sharding.make_mesh(fsdp=2, tensor=2), shapes)
    wanted = r"layers/q_proj: dimension 1 of \(2, 6, 12\) .* 4 devices .*'fsdp'; take fsdp=2"
    with pytest.raises(UserError, match=wanted):
        sharding.param_shardings(sharding.make_mesh(fsdp=4), shapes)


def test_axes_of_one_device_are_not_named():
    shapes = param_shapes(factories.spec())
    for place in sharding.param_shardings(sharding.make_mesh(), shapes).values():
        assert place.spec == PartitionSpec()
    found = sharding.param_shardings(sharding.make_mesh(tensor=2), shapes)
    assert found["embedding"].spec == PartitionSpec("tensor")
    assert found["layers/o_proj"].spec == PartitionSpec(None, "tensor")
