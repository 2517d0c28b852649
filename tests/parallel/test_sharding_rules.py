"""Which leaf is cut how, by path, and what is refused; conftest.py makes four devices."""

import builders
import factories
import jax
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from gkdjax.models.decoder_config import param_shapes
from gkdjax.parallel.mesh import AXES, make_mesh
from gkdjax.parallel.sharding_rules import ShardingRules
from gkdjax.train.step import init_state
from gkdjax.utils.errors import UserError

UNTIED = {"tie_word_embeddings": False}
INTO, OUT = PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")
TABLE, WHOLE = PartitionSpec("tensor", "fsdp"), PartitionSpec()


def rules(*sizes, model=None, own=(), **how):
    mesh = AbstractMesh(sizes, AXES)
    return (
        ShardingRules(mesh, **how) if model is None else ShardingRules.of(mesh, model, own, **how)
    )


def model(**config):
    return builders.small_model(**config)[0].spec


def specs(layout, shapes):
    return {path: layout.sharding_of(path, shape).spec for path, shape in shapes.items()}


@pytest.mark.parametrize("family", factories.FAMILIES)
def test_the_rules_cover_every_leaf_of_every_family(family):
    shapes = param_shapes(factories.spec(family, **UNTIED))
    found = specs(rules(1, 2, 2), shapes)
    assert {p for p, cut in found.items() if cut == WHOLE} == {p for p in shapes if "norm" in p}


def test_what_is_cut_how():
    shapes = param_shapes(factories.spec("qwen2", **UNTIED))
    found = specs(rules(1, 2, 2), shapes)
    assert found["embedding"] == found["unembedding"] == TABLE
    assert found["layers/k_proj"] == found["layers/up_proj"] == INTO
    assert found["layers/o_proj"] == found["layers/down_proj"] == OUT
    assert found["layers/v_bias"] == PartitionSpec(None, "tensor")
    # Axes of one device are not named: jit would take them for another program.
    assert set(specs(rules(4, 1, 1), shapes).values()) == {WHOLE}
    found = specs(rules(2, 1, 2), shapes)
    assert found["embedding"] == PartitionSpec("tensor")
    assert found["layers/o_proj"] == PartitionSpec(None, "tensor")


@pytest.mark.parametrize("full", [False, True])
def test_a_train_state_lies_as_its_parameters_do(full):
    decoder, params = builders.small_model(num_key_value_heads=2)
    state = init_state(params if full else builders.adapters(decoder), optax.adamw(1e-3))
    places = rules(1, 2, 2, model=decoder.spec).shardings_of(state)
    adam = places.opt_state[0]
    assert adam.mu == adam.nu == places.trainable
    assert places.step.spec == adam.count.spec == WHOLE
    if full:
        assert places.trainable["layers"]["q_proj"].spec == INTO
        assert places.trainable["embedding"].spec == TABLE
        return
    into, out = places.trainable["layers/up_proj"], places.trainable["layers/down_proj"]
    assert (into.a.spec, out.b.spec) == (
        PartitionSpec(None, "fsdp"),
        PartitionSpec(None, None, "fsdp"),
    )
    assert (out.a.spec, into.b.spec) == (
        PartitionSpec(None, "tensor"),
        PartitionSpec(None, None, "tensor"),
    )


LONG = (("final_norm", PartitionSpec(None, "fsdp")),)


@pytest.mark.parametrize(
    ("layout", "path", "shape", "message"),
    [
        (rules(4, 1, 1), "layers/router", (2, 4, 4), "no sharding rule .* 'layers/router'"),
        (
            rules(1, 4, 1),
            "layers/q_proj",
            (2, 6, 12),
            r"q_proj: dimension 1 of \(2, 6, 12\) .* 4 devices .*'fsdp'; take fsdp=2",
        ),
        (rules(1, 2, 2, rules=LONG), "final_norm", (8,), "final_norm: .* more axes than the leaf"),
    ],
)
def test_a_leaf_that_cannot_be_cut_is_named(layout, path, shape, message):
    with pytest.raises(ValueError, match=message):
        layout.sharding_of(path, shape)


def test_heads_and_vocabularies_that_do_not_divide_are_refused():
    """The vocabulary whatever the rules say."""
    with pytest.raises(UserError, match=r"6 attention heads .* 4 devices .*; take tensor=2"):
        rules(1, 1, 4, model=model(hidden_size=24, num_attention_heads=6))
    with pytest.raises(UserError, match=r"embedding: .* 34 cannot .* 4 devices .* tensor=2"):
        own = [("(un)?embedding", WHOLE)]
        rules(1, 1, 4, model=model(vocab_size=34, num_attention_heads=4), own=own)


def test_more_devices_than_key_value_heads_keep_them_whole_and_it_is_said(caplog):
    spec = model(num_attention_heads=4, num_key_value_heads=2)
    assert specs(rules(1, 2, 2, model=spec), param_shapes(spec))["layers/k_proj"] == INTO
    rules(1, 2, 4, model=spec, warn=False)
    assert not caplog.text
    found = specs(rules(1, 2, 4, model=spec), param_shapes(spec))
    assert "2 heads of keys and values" in caplog.text and "1/4 of the cache" in caplog.text
    assert found["layers/k_proj"] == found["layers/v_proj"] == PartitionSpec(None, "fsdp")
    assert found["layers/q_proj"] == INTO


def test_own_rules_come_first_and_jax_can_use_what_they_say():
    spec = model(num_key_value_heads=2)
    own = [("layers/.*", PartitionSpec(None, "fsdp"))]
    found = specs(rules(1, 2, 2, model=spec, own=own), param_shapes(spec))
    assert found["layers/o_proj"] == PartitionSpec(None, "fsdp")
    assert found["embedding"] == TABLE
    mesh = make_mesh(fsdp=2)
    place = ShardingRules(mesh).sharding_of("embedding", (8, 4))
    assert place == NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    assert jax.numpy.zeros((8, 4), device=place).addressable_shards[0].data.shape == (8, 2)
