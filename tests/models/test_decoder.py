"""The decoder against itself: padding, causality, remat, dtypes, initial parameters."""

import dataclasses
import functools

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax.models.decoder import Decoder
from gkdjax.models.decoder_config import param_shapes
from gkdjax.utils.tree import map_with_path
from tests.models.model_cases import GLOBAL, TOLERANCE, decoder_logits, distance, pair, rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(decoder, params) of a tiny Gemma 3."""
    return pair(tmp_path_factory.mktemp("model"))[1:]


def test_padding_side_and_padding_ids_do_not_matter(model):
    decoder, params = model
    lengths = (24, 17, 6)
    (left, left_mask), (right, right_mask) = (rows(24, lengths, s) for s in ("left", "right"))
    left[left_mask] = right[right_mask]  # row by row the same real tokens
    got_left = decoder_logits(decoder, params, left, left_mask)
    got_right = decoder_logits(decoder, params, right, right_mask)
    np.testing.assert_allclose(got_left[left_mask], got_right[right_mask], atol=TOLERANCE)
    left[~left_mask] = 0
    again = decoder_logits(decoder, params, left, left_mask)
    np.testing.assert_array_equal(again[left_mask], got_left[left_mask])


def test_a_token_sees_nothing_after_it(model):
    decoder, params = model
    tokens_BT, mask_BT = rows(24, (24, 24, 24), "left")
    before = decoder_logits(decoder, params, tokens_BT, mask_BT)
    tokens_BT[0, 12] = 3 + tokens_BT[0, 12] % 100
    after = decoder_logits(decoder, params, tokens_BT, mask_BT)
    np.testing.assert_array_equal(after[0, :12], before[0, :12])
    assert np.abs(after[0, 12:] - before[0, 12:]).max(axis=-1).min() > 1e-4


def test_remat_changes_nothing_but_memory(model):
    decoder, params = model
    tokens_BT, mask_BT = rows(24, (24, 17), "right")

    def loss(decoder, params):
        hidden_BTD = decoder.apply({"params": params}, tokens_BT, mask_BT)
        return jnp.sum(jnp.where(mask_BT[:, :, None], hidden_BTD, 0.0) ** 2)

    results = {}
    for remat in (False, True):
        of = functools.partial(loss, dataclasses.replace(decoder, remat=remat))
        step = jax.jit(jax.value_and_grad(of)).lower(params).compile()
        results[remat] = step(params), step.memory_analysis().temp_size_in_bytes
    ((value, grads), memory), ((value_remat, grads_remat), memory_remat) = results.values()
    assert memory_remat < 0.8 * memory  # it is really on
    np.testing.assert_allclose(value_remat, value, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads_remat, grads
    )
    smallest = min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    assert smallest > 0.1  # every parameter takes part, far above the tolerance


def test_bfloat16_compute_keeps_logits_in_float32(model):
    decoder, params = model
    tokens_BT, mask_BT = rows(24, (24, 17, 6), "left")
    low = dataclasses.replace(decoder, compute_dtype=jnp.bfloat16)
    hidden = jax.eval_shape(lambda p: low.apply({"params": p}, tokens_BT, mask_BT), params)
    assert hidden.dtype == jnp.bfloat16
    logits = decoder_logits(low, params, tokens_BT, mask_BT)
    assert logits.dtype == np.float32
    # Accumulated in float32, not rounded to bfloat16 on the way out.
    assert np.any(logits != logits.astype(jnp.bfloat16).astype(np.float32))
    wanted = decoder_logits(decoder, params, tokens_BT, mask_BT)
    assert 1e-4 < distance(logits, wanted, mask_BT) < 0.5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", factories.FAMILIES)
def test_init_makes_the_declared_parameters(family, tied):
    spec = factories.spec(family, tie_word_embeddings=tied)
    decoder = Decoder(spec, param_dtype=jnp.bfloat16)
    tokens_BT = jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(decoder.init, jax.random.key(0), tokens_BT, tokens_BT == 0)["params"]
    found = {}
    map_with_path(lambda path, leaf: found.update({path: (leaf.shape, leaf.dtype)}), params)
    wanted = {path: (shape, jnp.bfloat16) for path, shape in param_shapes(spec).items()}
    assert found == wanted


@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
def test_fresh_norms_scale_by_one_and_fresh_kernels_are_small(family):
    spec = factories.spec(family, num_hidden_layers=1, layer_types=[GLOBAL])
    tokens_BT = jnp.zeros((1, 4), jnp.int32)
    key = jax.random.key(0, impl="rbg")  # compiles in a fraction of threefry's time
    params = jax.jit(Decoder(spec).init)(key, tokens_BT, tokens_BT == 0)["params"]
    for name, leaf in params["layers"].items():
        if name.endswith("_norm"):
            np.testing.assert_array_equal(leaf + spec.norm_offset, 1.0)
        elif name.endswith("_bias"):
            assert not leaf.any()
        else:
            assert 0.015 < float(leaf.std()) < 0.025
