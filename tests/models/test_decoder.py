"""The decoder against itself: padding, causality, remat, dtypes, initial parameters."""

import dataclasses

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gkdjax.models.decoder import Decoder
from gkdjax.models.decoder_config import param_shapes
from gkdjax.models.layers import rms_norm
from tests.models.model_cases import GLOBAL, TOLERANCE, decoder_logits, distance, pair, rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(decoder, params) of a tiny Gemma 3."""
    return pair(tmp_path_factory.mktemp("model"))[1:]


def test_padding_side_and_padding_ids_do_not_matter(model):
    lengths = (24, 17, 6)
    (left, left_mask), (right, right_mask) = (rows(24, lengths, s) for s in ("left", "right"))
    left[left_mask] = right[right_mask]  # row by row the same real tokens
    got_left = decoder_logits(*model, left, left_mask)
    got_right = decoder_logits(*model, right, right_mask)
    np.testing.assert_allclose(got_left[left_mask], got_right[right_mask], atol=TOLERANCE)
    left[~left_mask] = 0
    again = decoder_logits(*model, left, left_mask)
    np.testing.assert_array_equal(again[left_mask], got_left[left_mask])


def test_a_token_sees_nothing_after_it(model):
    tokens_BT, mask_BT = rows(24, (24, 24, 24), "left")
    before = decoder_logits(*model, tokens_BT, mask_BT)
    tokens_BT[0, 12] = 3 + tokens_BT[0, 12] % 100
    after = decoder_logits(*model, tokens_BT, mask_BT)
    np.testing.assert_array_equal(after[0, :12], before[0, :12])
    assert np.abs(after[0, 12:] - before[0, 12:]).max(axis=-1).min() > 1e-4


def test_remat_changes_nothing_but_memory(model):
    decoder, params = model
    tokens_BT, mask_BT = rows(24, (24, 17), "right")
    results, memory = [], []
    for of in (decoder, dataclasses.replace(decoder, remat=True)):

        def loss(params, of=of):
            hidden_BTD = of.apply({"params": params}, tokens_BT, mask_BT)
            return jnp.sum(jnp.where(mask_BT[:, :, None], hidden_BTD, 0.0) ** 2)

        step = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        results.append(step(params))
        memory.append(step.memory_analysis().temp_size_in_bytes)
    assert memory[1] < 0.8 * memory[0]  # it is really on
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)
    smallest = min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(results[0][1]))
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


def test_a_norm_adds_its_offset_in_float32():
    x, low = jnp.arange(1.0, 9.0), jnp.full(8, 2.0**-10, jnp.bfloat16)  # 1 + low is 1 in bfloat16
    wanted = rms_norm(x, low.astype(jnp.float32), eps=1e-6, offset=1.0)
    np.testing.assert_array_equal(rms_norm(x, low, eps=1e-6, offset=1.0), wanted)


@pytest.mark.parametrize(("family", "tied"), [("gemma3", True), ("qwen2", False)])
def test_new_parameters_are_the_declared_ones_norms_scale_by_one_kernels_are_small(family, tied):
    tiny = {"num_hidden_layers": 1, "layer_types": [GLOBAL], "tie_word_embeddings": tied}
    spec, tokens_BT = factories.spec(family, **tiny), jnp.zeros((1, 4), jnp.int32)
    key = jax.random.key(0, impl="rbg")  # compiles in a fraction of threefry's time
    init = jax.jit(Decoder(spec, param_dtype=jnp.bfloat16).init)
    params = traverse_util.flatten_dict(init(key, tokens_BT, tokens_BT == 0)["params"], sep="/")
    assert {path: leaf.shape for path, leaf in params.items()} == param_shapes(spec)
    for path, leaf in params.items():
        assert leaf.dtype == jnp.bfloat16
        if path.endswith("_norm"):
            np.testing.assert_array_equal(leaf + spec.norm_offset, 1.0)
        elif path.endswith("_bias"):
            assert not leaf.any()
        else:
            assert 0.015 < float(leaf.std()) < 0.025
