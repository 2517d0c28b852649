"""The decoder against torch's Gemma 3 in float32, and against itself: cache, remat, dtypes."""

import dataclasses
import functools

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gkdjax import hf
from gkdjax.models import gemma3
from gkdjax.models.cache import init_cache
from gkdjax.models.decoder import Decoder
from gkdjax.models.spec import RopeSpec, param_shapes
from gkdjax.tree import map_with_path

TOLERANCE = 2e-5  # on logits with a standard deviation of about 1
GLOBAL, LOCAL = "full_attention", "sliding_attention"

# What a case changes in `factories.config`, and how long its rows are.
CASES = {
    "plain": ({}, 24),
    "window longer than the sequence": ({"sliding_window": 64}, 24),
    "window of one": ({"sliding_window": 1}, 24),
    "linear rope scaling": ({"rope_parameters": factories.rope_parameters(8.0)}, 24),
    "final softcap": ({"final_logit_softcapping": 1.5}, 24),
    "head_dim 10, three heads, one key": (
        {"head_dim": 10, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 45},
        24,
    ),
    "all global": ({"layer_types": [GLOBAL] * 3}, 24),
    "all local": ({"layer_types": [LOCAL] * 3}, 24),
    "single layer": ({"layer_types": [LOCAL], "num_hidden_layers": 1}, 24),
    "untied": ({"tie_word_embeddings": False}, 24),
    "larger eps": ({"rms_norm_eps": 0.1}, 24),
    "past 2,000 tokens": (
        {"sliding_window": 512, "rope_parameters": factories.rope_parameters(8.0)},
        2100,
    ),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(case) -> (torch model, decoder, params), both of the same weights on disk."""

    @functools.cache
    def models(case):
        overrides, _ = CASES[case]
        directory = factories.model_dir(tmp_path_factory.mktemp("model"), **overrides)
        return factories.torch_model(**overrides), *hf.load_pretrained(directory)

    return models


def rows(length: int, lengths: tuple[int, ...], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Random ids and the mask of rows of `lengths` real tokens, padded on `side`."""
    tokens_BT = np.random.default_rng(0).integers(3, factories.VOCAB_SIZE, (len(lengths), length))
    at = np.arange(length)
    real = [at >= length - n if side == "left" else at < n for n in lengths]
    return tokens_BT.astype(np.int32), np.stack(real)


def batch(case: str, side: str) -> tuple[np.ndarray, np.ndarray]:
    length = CASES[case][1]
    lengths = (length,) if length > 1000 else (length, length - 3, length // 2)
    return rows(length, lengths, side)


def torch_logits(model, tokens_BT, mask_BT) -> np.ndarray:
    with torch.no_grad():
        out = model(torch.tensor(tokens_BT).long(), attention_mask=torch.tensor(mask_BT).long())
    return out.logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def _logits(decoder, params, tokens_BT, mask_BT):
    hidden_BTD = decoder.apply({"params": params}, tokens_BT, mask_BT)
    return decoder.apply({"params": params}, hidden_BTD, method="unembed")


def decoder_logits(decoder, params, tokens_BT, mask_BT) -> np.ndarray:
    return np.asarray(_logits(decoder, params, tokens_BT, mask_BT))


def distance(got_BTV, wanted_BTV, mask_BT) -> float:
    return float(np.abs(got_BTV - wanted_BTV)[mask_BT].max())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_torch(load, case, side):
    model, decoder, params = load(case)
    tokens_BT, mask_BT = batch(case, side)
    wanted = torch_logits(model, tokens_BT, mask_BT)
    if case != "final softcap":
        assert 0.7 < wanted[mask_BT].std() < 1.5  # otherwise the tolerance means nothing
    got = decoder_logits(decoder, params, tokens_BT, mask_BT)
    assert got.dtype == np.float32
    assert np.isfinite(got).all()  # padding too
    assert distance(got, wanted, mask_BT) <= TOLERANCE


SCALED = "linear rope scaling"
WRONG = {
    "window one too long": ("plain", {"window": 6}),
    "window one too short": ("plain", {"window": 4}),
    "head_dim as the query scale": ("plain", {"query_scale": 16**-0.5}),
    "norm without its offset": ("plain", {"norm_offset": 0.0}),
    "embedding unscaled": ("plain", {"embedding_scale": 1.0}),
    "local and global exchanged": ("plain", {"is_global_L": (True, False, True)}),
    "global layers at the local theta": ("plain", {"rope_global": RopeSpec(1e4)}),
    "rope scaling missing": (SCALED, {"rope_global": RopeSpec(1e6)}),
    "rope scaling on local layers too": (SCALED, {"rope_local": RopeSpec(1e4, 8.0)}),
    "softcap missing": ("final softcap", {"final_softcap": None}),
    "eps of another family": ("larger eps", {"norm_eps": 1e-6}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_comparison_catches(load, wrong):
    case, changed = WRONG[wrong]
    model, decoder, params = load(case)
    spec = dataclasses.replace(decoder.spec, **changed)
    assert spec != decoder.spec
    tokens_BT, mask_BT = batch(case, "left")
    got = decoder_logits(Decoder(spec), params, tokens_BT, mask_BT)
    assert distance(got, torch_logits(model, tokens_BT, mask_BT), mask_BT) > 1000 * TOLERANCE


def test_padding_side_and_padding_ids_do_not_matter(load):
    _, decoder, params = load("plain")
    lengths = (24, 17, 6)
    (left, left_mask), (right, right_mask) = (rows(24, lengths, s) for s in ("left", "right"))
    left[left_mask] = right[right_mask]  # row by row the same real tokens
    got_left = decoder_logits(decoder, params, left, left_mask)
    got_right = decoder_logits(decoder, params, right, right_mask)
    np.testing.assert_allclose(got_left[left_mask], got_right[right_mask], atol=TOLERANCE)
    left[~left_mask] = 0
    again = decoder_logits(decoder, params, left, left_mask)
    np.testing.assert_array_equal(again[left_mask], got_left[left_mask])


def test_a_token_sees_nothing_after_it(load):
    _, decoder, params = load("plain")
    tokens_BT, mask_BT = rows(24, (24, 24, 24), "left")
    before = decoder_logits(decoder, params, tokens_BT, mask_BT)
    tokens_BT[0, 12] = 3 + tokens_BT[0, 12] % 100
    after = decoder_logits(decoder, params, tokens_BT, mask_BT)
    np.testing.assert_array_equal(after[0, :12], before[0, :12])
    assert np.abs(after[0, 12:] - before[0, 12:]).max(axis=-1).min() > 1e-4


def test_remat_changes_nothing_but_memory(load):
    _, decoder, params = load("plain")
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


@functools.partial(jax.jit, static_argnums=0)
def _read(decoder, params, cache, tokens_BT, mask_BT):
    variables = {"params": params}
    hidden, cache = decoder.apply(variables, tokens_BT, mask_BT, cache, method="extend")
    return decoder.apply(variables, hidden, method="unembed"), cache


def read_stepwise(decoder, params, tokens_BT, mask_BT, prefill: int) -> np.ndarray:
    """Logits [B,T,V] from a prefill of the first tokens and single steps for the rest."""

    read = functools.partial(_read, decoder, params)
    B, T = tokens_BT.shape
    cache = init_cache(decoder.spec, B, T + 2, jnp.float32)  # two slots stay free
    logits, cache = read(cache, tokens_BT[:, :prefill], mask_BT[:, :prefill])
    parts = [logits]
    for t in range(prefill, T):
        logits, cache = read(cache, tokens_BT[:, t : t + 1], mask_BT[:, t : t + 1])
        parts.append(logits)
    assert int(cache.columns) == T
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("case", ["plain", "all local"])
def test_cache_equals_the_uncached_forward(load, case):
    _, decoder, params = load(case)
    tokens_BT, mask_BT = rows(24, (24, 17, 13), "left")  # all pass the window of 5 after prefill
    wanted = decoder_logits(decoder, params, tokens_BT, mask_BT)
    got = read_stepwise(decoder, params, tokens_BT, mask_BT, prefill=12)
    assert distance(got, wanted, mask_BT) <= TOLERANCE


def test_the_cache_comparison_catches_a_window_that_is_off_by_one(load):
    _, decoder, params = load("plain")
    tokens_BT, mask_BT = rows(24, (24, 17, 13), "left")
    wanted = decoder_logits(decoder, params, tokens_BT, mask_BT)
    off = Decoder(dataclasses.replace(decoder.spec, window=6))
    got = read_stepwise(off, params, tokens_BT, mask_BT, prefill=1)
    assert distance(got, wanted, mask_BT) > 1000 * TOLERANCE


def test_finished_rows_may_pad_while_others_go_on(load):
    _, decoder, params = load("plain")
    tokens_BT, mask_BT = rows(24, (24, 17, 13), "left")
    wanted = decoder_logits(decoder, params, tokens_BT, mask_BT)
    mask_BT[1, 15:] = False  # this row has stopped, as in the sampler
    got = read_stepwise(decoder, params, tokens_BT, mask_BT, prefill=12)
    assert distance(got, wanted, mask_BT) <= TOLERANCE


def test_bfloat16_compute_keeps_logits_in_float32(load):
    _, decoder, params = load("plain")
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
def test_init_makes_the_declared_parameters(tied):
    spec = factories.spec(tie_word_embeddings=tied)
    decoder = Decoder(spec, param_dtype=jnp.bfloat16)
    tokens_BT = jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(decoder.init, jax.random.key(0), tokens_BT, tokens_BT == 0)["params"]
    found = {}
    map_with_path(lambda path, leaf: found.update({path: (leaf.shape, leaf.dtype)}), params)
    wanted = {path: (shape, jnp.bfloat16) for path, shape in param_shapes(spec).items()}
    assert found == wanted


def test_fresh_norms_scale_by_one_and_fresh_kernels_are_small():
    spec = factories.spec(num_hidden_layers=1, layer_types=[GLOBAL])
    tokens_BT = jnp.zeros((1, 4), jnp.int32)
    key = jax.random.key(0, impl="rbg")  # compiles in a fraction of threefry's time
    params = jax.jit(Decoder(spec).init)(key, tokens_BT, tokens_BT == 0)["params"]
    for name, leaf in params["layers"].items():
        if name.endswith("_norm"):
            assert not leaf.any()  # plus the offset of 1
        else:
            assert 0.015 < float(leaf.std()) < 0.025


NEW_FORM = {
    "model_type": "gemma3_text",
    "vocab_size": 128,
    "hidden_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
}
OLD_FORM = NEW_FORM | {
    "rope_theta": 5e5,
    "rope_local_base_freq": 2e4,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "sliding_window_pattern": 3,
}


def test_old_and_new_config_forms_give_one_spec():
    new = NEW_FORM | {
        "rope_parameters": {
            GLOBAL: {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0},
            LOCAL: {"rope_theta": 2e4, "rope_type": "default"},
        },
        "layer_types": [GLOBAL if (i + 1) % 3 == 0 else LOCAL for i in range(8)],
    }
    spec = gemma3.decoder_spec(new)
    assert spec == gemma3.decoder_spec(OLD_FORM)
    assert spec.rope_global == RopeSpec(5e5, 4.0)
    assert spec.rope_local == RopeSpec(2e4)
    assert spec.is_global_L == (False, False, True) * 2 + (False, False)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"hidden_activation": "relu"}, "relu"),
        ({"layer_types": [LOCAL] * 7 + ["chunked_attention"]}, "chunked_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ],
)
def test_a_config_that_the_decoder_does_not_compute_is_refused(changed, named):
    with pytest.raises(ValueError, match=named):
        gemma3.decoder_spec(OLD_FORM | changed)
