"""LoRA as a tree transform: new adapters, merge and attach, gradients, dropout, bad input."""

import dataclasses
import functools

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax.config import Lora
from gkdjax.models import lora
from gkdjax.models.layers import LoraKernel, dense

RULES = Lora(rank=4, alpha=12.0, dropout=0.5)
DECODER, PARAMS = builders.small_model(num_hidden_layers=3, layer_types=[builders.GLOBAL] * 3)
ADAPTERS = builders.adapters(DECODER, rank=4, dropout=0.5)  # as after some training
TOKENS_BT = np.random.default_rng(0).integers(3, 32, (2, 12)).astype(np.int32)
MASK_BT = np.arange(12)[None, :] >= np.array([0, 5])[:, None]


@jax.jit
def _logits(params):
    hidden_BTD = DECODER.apply({"params": params}, TOKENS_BT, MASK_BT)
    return DECODER.apply({"params": params}, hidden_BTD, method="unembed")


def logits(params) -> np.ndarray:
    return np.asarray(_logits(params))[MASK_BT]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_new_kernel_is_an_identity_to_the_bit(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (7, 24), dtype)
    w = jax.random.normal(keys[1], (24, 16), jnp.bfloat16)
    a = jax.random.normal(keys[2], (24, 4))
    new = LoraKernel(w, a, jnp.zeros((4, 16)), None, scale=2.0, dropout=0.5)
    np.testing.assert_array_equal(dense(x, new), dense(x, w))
    np.testing.assert_array_equal(jax.jit(dense)(x, new), jax.jit(dense)(x, w))
    assert dense(x, new).dtype == dtype


def test_dropout_drops_the_input_of_a_and_keeps_the_mean():
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    kernel = LoraKernel(zero, one, one, jax.random.key(0), scale=1.0, dropout=0.25)
    update = np.asarray(dense(jnp.ones((4000, 1)), kernel))
    assert set(np.unique(update)) == {0.0, np.float32(1 / 0.75)}
    # Five standard errors of a mean of 4,000.
    assert abs(update.mean() - 1.0) < 5 * (0.25 / 0.75 / 4000) ** 0.5


def test_new_adapters_change_nothing_and_trained_ones_as_much_attached_as_merged():
    before, new = logits(PARAMS), lora.init(jax.random.key(0), PARAMS, RULES)
    np.testing.assert_allclose(logits(lora.attach(PARAMS, new)), before, atol=1e-5)
    attached = logits(lora.attach(PARAMS, ADAPTERS))
    np.testing.assert_allclose(logits(lora.merge(PARAMS, ADAPTERS)), attached, atol=1e-5)
    assert np.abs(attached - before).max() > 0.1


def test_merge_is_computed_in_float32_and_keeps_the_base_dtype():
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    merged = lora.merge(low, ADAPTERS)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {np.dtype(jnp.bfloat16)}
    for path, adapter in ADAPTERS.items():
        name = path.removeprefix("layers/")
        w, a, b = (np.asarray(m, np.float64) for m in (low["layers"][name], adapter.a, adapter.b))
        wanted = w + adapter.scale * np.einsum("Lir,Lro->Lio", a, b)
        got = np.asarray(merged["layers"][name], np.float64)
        # Rounded once: half a unit in the last place of bfloat16, 8 bits.
        np.testing.assert_allclose(got, wanted, rtol=2**-8, atol=1e-6)


def test_leaves_without_an_adapter_are_the_same_objects():
    rules = dataclasses.replace(RULES, targets=("q_proj", "layers/(up|down)_proj"))
    chosen = lora.init(jax.random.key(0), PARAMS, rules)
    assert set(chosen) == {"layers/q_proj", "layers/up_proj", "layers/down_proj"}
    for changed in (lora.attach(PARAMS, chosen), lora.merge(PARAMS, chosen)):
        assert changed["embedding"] is PARAMS["embedding"]
        for name, leaf in PARAMS["layers"].items():
            assert (changed["layers"][name] is leaf) == (f"layers/{name}" not in chosen)


def test_gradients_reach_every_a_and_b_and_nothing_else():
    decoder = dataclasses.replace(DECODER, remat=True)  # as in training

    def loss(adapters):
        attached = lora.attach(PARAMS, adapters, jax.random.key(0))
        hidden_BTD = decoder.apply({"params": attached}, TOKENS_BT, MASK_BT)
        return jnp.sum(jnp.where(MASK_BT[:, :, None], hidden_BTD, 0.0) ** 2)

    grads = jax.jit(jax.grad(loss))(ADAPTERS)
    assert jax.tree.structure(grads) == jax.tree.structure(ADAPTERS)
    assert len(jax.tree.leaves(grads)) == 2 * len(lora.ALL_LINEAR)
    for path, grad in grads.items():
        for part in (grad.a, grad.b):
            assert part.dtype == jnp.float32
            assert bool(jnp.all(jnp.abs(part).max(axis=(1, 2)) > 1e-6)), path  # in every layer


def test_dropout_acts_with_a_key_only_and_depends_on_it():
    off = logits(lora.attach(PARAMS, ADAPTERS))
    on, again, other = (
        logits(lora.attach(PARAMS, ADAPTERS, jax.random.key(seed))) for seed in (7, 7, 8)
    )
    np.testing.assert_array_equal(on, again)
    assert min(np.abs(on - x).max() for x in (off, other)) > 1e-2
    without = {path: dataclasses.replace(a, dropout=0.0) for path, a in ADAPTERS.items()}
    again = logits(lora.attach(PARAMS, without, jax.random.key(7)))
    np.testing.assert_array_equal(again, off)
    layers = lora.attach(PARAMS, ADAPTERS, jax.random.key(7))["layers"]
    keys = [jax.random.key_data(layers[name].dropout_key) for name in lora.ALL_LINEAR]
    assert len({key.tobytes() for of_kernel in keys for key in np.asarray(of_kernel)}) == 21


def test_all_linear_names_every_kernel():
    wanted = {f"layers/{c}_proj" for c in ("q", "k", "v", "o", "gate", "up", "down")}
    init = functools.partial(lora.init, jax.random.key(0), PARAMS)
    shapes = jax.eval_shape(lambda: init(Lora()))
    everything = dataclasses.replace(RULES, targets="all-linear")
    assert set(shapes) == set(jax.eval_shape(lambda: init(everything))) == wanted
    for path, adapter in shapes.items():
        L, fan_in, fan_out = PARAMS["layers"][path.removeprefix("layers/")].shape
        assert (adapter.a.shape, adapter.b.shape) == ((L, fan_in, 64), (L, 64, fan_out))
        assert (adapter.scale, adapter.dropout) == (2.0, 0.05)
        assert adapter.a.dtype == adapter.b.dtype == jnp.float32


def test_a_kernels_values_depend_on_the_key_and_its_path_only():
    every = lora.init(jax.random.key(0), PARAMS, RULES)
    one = lora.init(jax.random.key(0), PARAMS, dataclasses.replace(RULES, targets=("v_proj",)))
    np.testing.assert_array_equal(one["layers/v_proj"].a, every["layers/v_proj"].a)
    assert not np.array_equal(every["layers/k_proj"].a, every["layers/v_proj"].a)
    a, bound = np.asarray(every["layers/v_proj"].a), 16**-0.5
    assert -bound <= a.min() < -0.9 * bound and 0.9 * bound < a.max() <= bound


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (("q_proj", "query"), r"\(query\).* matches none of.*q_proj"),
        (("attn_norm",), r"\(attn_norm\).* matches none"),
        (("layers/q",), "'layers/q'"),  # a regex matches the whole path
        (("(",), r"'\('"),
        ((), "list of names"),
        ("q_proj", "'q_proj'"),
    ],
)
def test_a_rule_that_matches_nothing_is_named(targets, named):
    with pytest.raises(ValueError, match=named):
        lora.init(jax.random.key(0), PARAMS, dataclasses.replace(RULES, targets=targets))


@pytest.mark.parametrize("transform", [lora.attach, lora.merge])
def test_an_adapter_that_does_not_fit_is_named(transform):
    good = ADAPTERS["layers/q_proj"]
    for a, b in (
        *((good.a[:, :-1], good.b), (good.a, good.b[:, :, :-1]), (good.a, good.b[:, :-1])),
        (good.a[:2], good.b[:2]),
    ):
        wrong = dataclasses.replace(good, a=a, b=b)
        with pytest.raises(ValueError, match=r"layers/q_proj.*another base"):
            transform(PARAMS, {"layers/q_proj": wrong})
    for path in ("layers/qkv_proj", "embedding", "q_proj", "layers/attn_norm"):
        with pytest.raises(ValueError, match=f"'{path}' has no kernel"):
            transform(PARAMS, {path: good})
