"""LoRA as a tree transform: fresh identity, merge equals attach, gradients, dropout, bad input."""

import dataclasses
import functools

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax.config import Lora
from gkdjax.models import lora
from gkdjax.models.hf import load
from gkdjax.models.layers import LoraKernel, dense

RULES = Lora(rank=4, alpha=12.0, dropout=0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(decoder, params): random weights, float32, three layers of both kinds."""
    return load.load_pretrained(factories.model_dir(tmp_path_factory.mktemp("lora")))


TOKENS_BT = np.random.default_rng(0).integers(3, factories.VOCAB_SIZE, (2, 12)).astype(np.int32)
MASK_BT = np.arange(12)[None, :] >= np.array([0, 5])[:, None]


@functools.partial(jax.jit, static_argnums=0)
def _logits(decoder, params):
    hidden_BTD = decoder.apply({"params": params}, TOKENS_BT, MASK_BT)
    return decoder.apply({"params": params}, hidden_BTD, method="unembed")


def logits(decoder, params) -> np.ndarray:
    return np.asarray(_logits(decoder, params))[MASK_BT]


def trained(adapters: dict, seed: int = 1) -> dict:
    """The adapters with a random `b`, as after some training."""
    rng = np.random.default_rng(seed)
    return {
        path: dataclasses.replace(
            adapter, b=jnp.asarray(0.05 * rng.standard_normal(adapter.b.shape), jnp.float32)
        )
        for path, adapter in adapters.items()
    }


@pytest.fixture(scope="module")
def adapters(model):
    return trained(lora.init(jax.random.key(0), model[1], RULES))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_fresh_kernel_is_an_identity_to_the_bit(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (7, 24), dtype)
    w = jax.random.normal(keys[1], (24, 16), jnp.bfloat16)
    a = jax.random.normal(keys[2], (24, 4))
    fresh = LoraKernel(w, a, jnp.zeros((4, 16)), None, scale=2.0, dropout=0.5)
    np.testing.assert_array_equal(dense(x, fresh), dense(x, w))
    np.testing.assert_array_equal(jax.jit(dense)(x, fresh), jax.jit(dense)(x, w))
    assert dense(x, fresh).dtype == dtype


def test_dense_is_the_papers_equation():
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.standard_normal(s) for s in [(7, 24), (24, 16), (24, 4), (4, 16)])
    kernel = LoraKernel(*(jnp.asarray(m, jnp.float32) for m in (w, a, b)), None, 2.5, 0.0)
    wanted = x @ (w + 2.5 * a @ b)
    np.testing.assert_allclose(dense(jnp.asarray(x, jnp.float32), kernel), wanted, rtol=1e-4)


def test_a_fresh_adapter_is_an_identity_of_the_model(model):
    decoder, params = model
    fresh = lora.init(jax.random.key(0), params, RULES)
    got = logits(decoder, lora.attach(params, fresh))
    np.testing.assert_allclose(got, logits(decoder, params), atol=1e-5)


def test_merge_equals_attach_and_both_do_something(model, adapters):
    decoder, params = model
    attached = logits(decoder, lora.attach(params, adapters))
    merged = logits(decoder, lora.merge(params, adapters))
    np.testing.assert_allclose(merged, attached, atol=1e-5)
    assert np.abs(attached - logits(decoder, params)).max() > 0.1


def test_merge_is_computed_in_float32_and_keeps_the_base_dtype(model, adapters):
    _, params = model
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    merged = lora.merge(low, adapters)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {np.dtype(jnp.bfloat16)}
    for path, adapter in adapters.items():
        name = path.removeprefix("layers/")
        w, a, b = (np.asarray(m, np.float64) for m in (low["layers"][name], adapter.a, adapter.b))
        wanted = w + 12.0 / 4 * np.einsum("Lir,Lro->Lio", a, b)
        got = np.asarray(merged["layers"][name], np.float64)
        # Rounded once: half a unit in the last place of bfloat16, 8 bits.
        np.testing.assert_allclose(got, wanted, rtol=2**-8, atol=1e-6)


def test_untargeted_leaves_are_the_same_objects(model):
    _, params = model
    rules = dataclasses.replace(RULES, targets=("q_proj", "layers/(up|down)_proj"))
    chosen = lora.init(jax.random.key(0), params, rules)
    assert set(chosen) == {"layers/q_proj", "layers/up_proj", "layers/down_proj"}
    for changed in (lora.attach(params, chosen), lora.merge(params, chosen)):
        assert changed["embedding"] is params["embedding"]
        for name, leaf in params["layers"].items():
            assert (changed["layers"][name] is leaf) == (f"layers/{name}" not in chosen)


def test_gradients_reach_every_a_and_b_and_nothing_else(model, adapters):
    decoder, params = model
    decoder = dataclasses.replace(decoder, remat=True)  # as in training

    @jax.jit
    def gradients(adapters):
        def loss(adapters):
            attached = lora.attach(params, adapters, jax.random.key(0))
            hidden_BTD = decoder.apply({"params": attached}, TOKENS_BT, MASK_BT)
            return jnp.sum(jnp.where(MASK_BT[:, :, None], hidden_BTD, 0.0) ** 2)

        return jax.grad(loss)(adapters)

    grads = gradients(adapters)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    assert len(jax.tree.leaves(grads)) == 2 * len(lora.ALL_LINEAR)
    for path, grad in grads.items():
        for part in (grad.a, grad.b):
            assert part.dtype == jnp.float32
            assert bool(jnp.all(jnp.abs(part).max(axis=(1, 2)) > 1e-6)), path  # in every layer


def test_dropout_acts_with_a_key_only_and_depends_on_it(model, adapters):
    decoder, params = model
    off = logits(decoder, lora.attach(params, adapters))
    key = jax.random.key(7)
    on = logits(decoder, lora.attach(params, adapters, key))
    assert np.abs(on - off).max() > 1e-2
    np.testing.assert_array_equal(on, logits(decoder, lora.attach(params, adapters, key)))
    other = logits(decoder, lora.attach(params, adapters, jax.random.key(8)))
    assert np.abs(on - other).max() > 1e-2
    without = {p: dataclasses.replace(a, dropout=0.0) for p, a in adapters.items()}
    again = logits(decoder, lora.attach(params, without, key))
    np.testing.assert_array_equal(again, off)


def test_layers_and_kernels_draw_their_own_dropout(model, adapters):
    attached = lora.attach(model[1], adapters, jax.random.key(7))["layers"]
    keys = [
        jax.random.key_data(attached[name].dropout_key[layer]).tobytes()
        for name in lora.ALL_LINEAR
        for layer in range(3)
    ]
    assert len(set(keys)) == len(keys) == 21


def test_dropout_drops_the_input_of_a_and_keeps_the_mean():
    x = jnp.ones((4000, 1))
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    kernel = LoraKernel(zero, one, one, jax.random.key(0), scale=1.0, dropout=0.25)
    update = np.asarray(dense(x, kernel))
    assert set(np.unique(update)) == {0.0, np.float32(1 / 0.75)}
    # Five standard errors of a mean of 4,000 draws.
    assert abs(update.mean() - 1.0) < 5 * (0.25 / 0.75 / 4000) ** 0.5


def test_defaults_and_all_linear(model):
    _, params = model
    rules = Lora()
    assert (rules.rank, rules.alpha, rules.dropout) == (64, 128.0, 0.05)
    wanted = {f"layers/{c}_proj" for c in ("q", "k", "v", "o", "gate", "up", "down")}
    everything = dataclasses.replace(rules, targets="all-linear")
    shapes = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, rules), params)
    assert set(shapes) == wanted
    assert set(lora.init(jax.random.key(0), params, everything)) == wanted
    for path, adapter in shapes.items():
        L, fan_in, fan_out = params["layers"][path.removeprefix("layers/")].shape
        assert adapter.a.shape == (L, fan_in, 64)
        assert adapter.b.shape == (L, 64, fan_out)
        assert (adapter.scale, adapter.dropout) == (2.0, 0.05)
        assert adapter.a.dtype == adapter.b.dtype == jnp.float32


def test_a_kernels_draw_depends_on_the_key_and_its_path_only(model):
    _, params = model
    every = lora.init(jax.random.key(0), params, RULES)
    one = lora.init(jax.random.key(0), params, dataclasses.replace(RULES, targets=("v_proj",)))
    np.testing.assert_array_equal(one["layers/v_proj"].a, every["layers/v_proj"].a)
    assert not np.array_equal(every["layers/k_proj"].a, every["layers/v_proj"].a)
    bound = 48**-0.5
    a = np.asarray(every["layers/v_proj"].a)
    assert -bound <= a.min() < -0.9 * bound
    assert 0.9 * bound < a.max() <= bound


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
def test_a_rule_that_matches_nothing_is_named(model, targets, named):
    rules = dataclasses.replace(RULES, targets=targets)
    with pytest.raises(ValueError, match=named):
        lora.init(jax.random.key(0), model[1], rules)


@pytest.mark.parametrize("transform", [lora.attach, lora.merge])
def test_an_adapter_that_does_not_fit_is_named(model, adapters, transform):
    _, params = model
    good = adapters["layers/q_proj"]
    for wrong in (
        dataclasses.replace(good, a=good.a[:, :-1]),
        dataclasses.replace(good, b=good.b[:, :, :-1]),
        dataclasses.replace(good, b=good.b[:, :-1]),
        dataclasses.replace(good, a=good.a[:2], b=good.b[:2]),
    ):
        with pytest.raises(ValueError, match=r"layers/q_proj.*another base"):
            transform(params, {"layers/q_proj": wrong})
    for path in ("layers/qkv_proj", "embedding", "q_proj", "layers/attn_norm"):
        with pytest.raises(ValueError, match=f"'{path}' has no kernel"):
            transform(params, {path: good})
