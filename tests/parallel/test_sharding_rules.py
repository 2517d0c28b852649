"""Which leaf is cut how, by path, and what is refused; conftest.py makes four devices."""

import builders
import factories
import jax
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from gkdjax.models.decoder_config import param_shapes
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.parallel.sharding_rules import ShardingRules
from gkdjax.train.step import init_state
from gkdjax.utils.errors import UserError

UNTIED = {"tie_word_embeddings": False}
INTO, OUT = PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")


def mesh_of(*sizes):
    return AbstractMesh(sizes, parallel_mesh.AXES)


def specs(layout, shapes):
    return {path: layout.sharding_of(path, shape).spec for path, shape in shapes.items()}


@pytest.mark.parametrize("family", factories.FAMILIES)
def test_the_rules_cover_every_leaf_of_every_family(family):
    shapes = param_shapes(factories.spec(family, **UNTIED))
    found = specs(ShardingRules(mesh_of(1, 2, 2)), shapes)
    whole = {path for path, spec in found.items() if spec == PartitionSpec()}
    assert whole == {path for path in shapes if path.endswith("norm")}


def test_what_is_cut_how():
    found = specs(ShardingRules(mesh_of(1, 2, 2)), param_shapes(factories.spec("qwen2", **UNTIED)))
    assert found["embedding"] == found["unembedding"] == PartitionSpec("tensor", "fsdp")
    assert found["layers/k_proj"] == found["layers/up_proj"] == INTO
    assert found["layers/o_proj"] == found["layers/down_proj"] == OUT
    assert found["layers/v_bias"] == PartitionSpec(None, "tensor")
    assert found["final_norm"] == found["layers/attn_norm"] == PartitionSpec()


@pytest.mark.parametrize("full", [False, True])
def test_a_train_state_lies_as_its_parameters_do(full):
    decoder, params = builders.small_model(num_key_value_heads=2)
    trainable = params if full else builders.adapters(decoder)
    state = init_state(trainable, optax.adamw(1e-3))
    layout = ShardingRules.of(mesh_of(1, 2, 2), decoder.spec)
    places = layout.shardings_of(state)
    adam = places.opt_state[0]
    assert adam.mu == adam.nu == places.trainable
    assert places.step.spec == adam.count.spec == PartitionSpec()
    if full:
        assert places.trainable["layers"]["q_proj"].spec == INTO
        assert places.trainable["embedding"].spec == PartitionSpec("tensor", "fsdp")
    else:
        into, out = places.trainable["layers/up_proj"], places.trainable["layers/down_proj"]
        assert (into.a.spec, into.b.spec) == (
            PartitionSpec(None, "fsdp"),
            PartitionSpec(None, None, "tensor"),
        )
        assert (out.a.spec, out.b.spec) == (
            PartitionSpec(None, "tensor"),
            PartitionSpec(None, None, "fsdp"),
        )


def test_a_leaf_without_a_rule_is_named():
    with pytest.raises(ValueError, match="'layers/router'"):
        ShardingRules(mesh_of(4, 1, 1)).sharding_of("layers/router", (2, 4, 4))


def test_a_dimension_that_does_not_divide_is_named():
    shape = (2, 6, 12)
    ShardingRules(mesh_of(1, 2, 2)).sharding_of("layers/q_proj", shape)
    wanted = r"layers/q_proj: dimension 1 of \(2, 6, 12\) .* 4 devices .*'fsdp'; take fsdp=2"
    with pytest.raises(UserError, match=wanted):
        ShardingRules(mesh_of(1, 4, 1)).sharding_of("layers/q_proj", shape)


def test_axes_of_one_device_are_not_named():
    shapes = param_shapes(factories.spec())
    assert set(specs(ShardingRules(mesh_of(4, 1, 1)), shapes).values()) == {PartitionSpec()}
    found = specs(ShardingRules(mesh_of(2, 1, 2)), shapes)
    assert found["embedding"] == PartitionSpec("tensor")
    assert found["layers/o_proj"] == PartitionSpec(None, "tensor")


def test_heads_that_do_not_divide_are_refused():
    spec = builders.small_model(hidden_size=24, num_attention_heads=6)[0].spec
    with pytest.raises(UserError, match=r"6 attention heads .* 4 devices .*; take tensor=2"):
        ShardingRules.of(mesh_of(1, 1, 4), spec)


def test_a_vocabulary_that_does_not_divide_is_refused_whatever_the_rules_say():
    spec = builders.small_model(vocab_size=34, num_attention_heads=4)[0].spec
    own = [("(un)?embedding", PartitionSpec())]
    with pytest.raises(UserError, match=r"embedding: .* 34 cannot .* 4 devices .* tensor=2"):
        ShardingRules.of(mesh_of(1, 1, 4), spec, own)


def test_more_devices_than_key_value_heads_keep_them_whole_and_it_is_told(caplog):
    spec = builders.small_model(num_attention_heads=4, num_key_value_heads=2)[0].spec
    layout = ShardingRules.of(mesh_of(1, 2, 4), spec)
    assert "2 heads of keys and values" in caplog.text and "1/4 of the cache" in caplog.text
    found = specs(layout, param_shapes(spec))
    assert found["layers/k_proj"] == found["layers/v_proj"] == PartitionSpec(None, "fsdp")
    assert found["layers/q_proj"] == INTO
    caplog.clear()
    assert (
        specs(ShardingRules.of(mesh_of(1, 2, 2), spec), param_shapes(spec))["layers/k_proj"] == INTO
    )
    assert not caplog.text


def test_own_rules_come_first():
    own = [("layers/.*", PartitionSpec(None, "fsdp"))]
    spec = builders.small_model(num_key_value_heads=2)[0].spec
    found = specs(ShardingRules.of(mesh_of(1, 2, 2), spec, own), param_shapes(spec))
    assert found["layers/o_proj"] == PartitionSpec(None, "fsdp")
    assert found["embedding"] == PartitionSpec("tensor", "fsdp")
    long = ShardingRules(mesh_of(1, 2, 2), (("final_norm", PartitionSpec(None, "fsdp")),))
    with pytest.raises(UserError, match=r"final_norm: .* more axes than the leaf"):
        long.sharding_of("final_norm", (8,))


def test_a_place_is_one_that_jax_can_use():
    mesh = parallel_mesh.make_mesh(fsdp=2)
    place = ShardingRules(mesh).sharding_of("embedding", (8, 4))
    assert place == NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    assert jax.numpy.zeros((8, 4), device=place).addressable_shards[0].data.shape == (8, 2)
