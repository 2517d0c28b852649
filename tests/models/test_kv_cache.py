"""Reading with a cache, or after a shared prefix, against reading it all at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax.models.decoder import Decoder, read_prefix
from gkdjax.models.kv_cache import init_cache
from tests.models.model_cases import (
    GLOBAL,
    LOCAL,
    TOLERANCE,
    decoder_logits,
    distance,
    pair,
    rows,
)

CASES = {
    "gemma3": ("gemma3", {}),
    "gemma3, all local": ("gemma3", {"layer_types": [LOCAL] * 3}),
    "gemma3, window of one": ("gemma3", {"sliding_window": 1}),
    "gemma3, window longer than the row": ("gemma3", {"sliding_window": 64}),
    "qwen3, window": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": [GLOBAL, LOCAL, LOCAL],
            "max_window_layers": 1,
        },
    ),
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {}),
}
DECODING_TOLERANCE = 1e-4  # other programs, other orders of summation


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(case) -> (decoder, params)."""

    @functools.cache
    def models(case):
        family, overrides = CASES[case]
        return pair(tmp_path_factory.mktemp("model"), family, **overrides)[1:]

    return models


@functools.partial(jax.jit, static_argnums=0)
def _read(decoder, params, cache, tokens_BT, mask_BT, prefix):
    variables = {"params": params}
    hidden, cache = decoder.apply(variables, tokens_BT, mask_BT, cache, prefix, method="extend")
    return decoder.apply(variables, hidden, method="unembed"), cache


def read_in_parts(decoder, params, tokens_BT, mask_BT, parts, prefix=None) -> np.ndarray:
    """Logits [B,T,V] of reading `parts` tokens at a time, then one at a time."""
    B, T = tokens_BT.shape
    cache = init_cache(decoder.spec, B, T + 2, jnp.float32)  # two slots stay free
    logits, start = [], 0
    for length in (*parts, *[1] * (T - sum(parts))):
        now = slice(start, start + length)
        read = tokens_BT[:, now], mask_BT[:, now]
        part, cache = _read(decoder, params, cache, *read, prefix)
        logits.append(part)
        start += length
    assert int(cache.columns) == T
    np.testing.assert_array_equal(cache.real_B, mask_BT.sum(1))
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("case", CASES)
def test_a_prefill_leaves_the_cache_that_reading_leaves(load, case):
    decoder, params = load(case)
    tokens_BT, mask_BT = rows(13, (13, 9, 4), "left")
    variables, read = {"params": params}, (tokens_BT, mask_BT)
    prefix = prefix_of(decoder, params)
    hidden, cache = decoder.apply(variables, *read, 16, prefix, method="prefill")
    empty = init_cache(decoder.spec, 3, 16, jnp.float32)
    wanted_hidden, wanted = decoder.apply(variables, *read, empty, prefix, method="extend")
    assert distance(hidden, wanted_hidden, mask_BT) <= DECODING_TOLERANCE
    # A padding token sees nothing, and what stands in its slot means nothing.
    cleared, wanted_cleared = _without_padding(cache), _without_padding(wanted)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), cleared, wanted_cleared)


def _without_padding(cache):
    def clear(stack):
        real = stack.mask_BS[None, :, :, None, None]
        return stack._replace(k_LBSGC=stack.k_LBSGC * real, v_LBSGC=stack.v_LBSGC * real)

    stacks = {
        kind: clear(getattr(cache, kind))
        for kind in ("global_layers", "local_layers")
        if getattr(cache, kind) is not None
    }
    return cache._replace(**stacks)


# A prefill longer than the window, then parts shorter, as long, and longer than it.
@pytest.mark.parametrize("parts", [(12,), (1,), (3, 4, 5, 7)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_cache_equals_the_uncached_forward(load, case, parts):
    decoder, params = load(case)
    tokens_BT, mask_BT = rows(24, (24, 17, 13), "left")
    wanted = decoder_logits(decoder, params, tokens_BT, mask_BT)
    got = read_in_parts(decoder, params, tokens_BT, mask_BT, parts)
    assert distance(got, wanted, mask_BT) <= DECODING_TOLERANCE


def test_local_layers_keep_no_more_than_the_window(load):
    decoder, _ = load("gemma3")
    cache = init_cache(decoder.spec, 2, 100, jnp.bfloat16)
    assert cache.global_layers.k_LBSGC.shape == (1, 2, 100, 2, 16)
    assert cache.local_layers.k_LBSGC.shape == (2, 2, 5, 2, 16)
    assert cache.local_layers.v_LBSGC.dtype == jnp.bfloat16


@pytest.mark.parametrize("window", [4, 6])
def test_the_cache_comparison_catches_a_window_that_is_off_by_one(load, window):
    decoder, params = load("gemma3")
    tokens_BT, mask_BT = rows(24, (24, 17, 13), "left")
    wanted = decoder_logits(decoder, params, tokens_BT, mask_BT)
    off = Decoder(dataclasses.replace(decoder.spec, window=window))
    got = read_in_parts(off, params, tokens_BT, mask_BT, (1,))
    assert distance(got, wanted, mask_BT) > 1000 * TOLERANCE


def test_finished_rows_may_pad_while_others_go_on(load):
    decoder, params = load("gemma3")
    tokens_BT, mask_BT = rows(24, (24, 17, 13), "left")
    wanted = decoder_logits(decoder, params, tokens_BT, mask_BT)
    mask_BT[1, 15:] = False  # this row has stopped, as in the sampler
    got = read_in_parts(decoder, params, tokens_BT, mask_BT, (12,))
    assert distance(got, wanted, mask_BT) <= DECODING_TOLERANCE


def with_prefix(prefix_P, tokens_BT, mask_BT):
    """Rows that bring the prefix themselves; theirs are padded on the right."""
    copies = np.broadcast_to(prefix_P, (len(tokens_BT), len(prefix_P)))
    ones = np.ones(copies.shape, bool)
    return np.concatenate([copies, tokens_BT], 1), np.concatenate([ones, mask_BT], 1)


_read_prefix = jax.jit(read_prefix, static_argnames=("decoder", "chunk"))


@functools.partial(jax.jit, static_argnums=0)
def _logits_after(decoder, params, prefix, tokens_BT, mask_BT):
    hidden_BTD = decoder.apply({"params": params}, tokens_BT, mask_BT, prefix)
    return decoder.apply({"params": params}, hidden_BTD, method="unembed")


PREFIX_P = np.random.default_rng(7).integers(3, 100, 19).astype(np.int32)


def prefix_of(decoder, params, prefix_P=PREFIX_P, padding: int = 0, chunk: int = 64):
    tokens_1P = np.concatenate([np.zeros(padding, np.int32), prefix_P])[None]
    mask_1P = (np.arange(tokens_1P.shape[1]) >= padding)[None]
    return _read_prefix(decoder, params, tokens_1P, mask_1P, chunk=chunk)


# Rows shorter than the window of 5 see the prefix in local layers; longer ones pass it.
@pytest.mark.parametrize("length", [4, 13])
@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("case", CASES)
def test_a_shared_prefix_equals_one_of_each_row(load, case, padding, length):
    decoder, params = load(case)
    tokens_BT, mask_BT = rows(length, (length, length - 2, 1), "right")
    whole = with_prefix(PREFIX_P, tokens_BT, mask_BT)
    wanted = decoder_logits(decoder, params, *whole)[:, len(PREFIX_P) :]
    prefix = prefix_of(decoder, params, padding=padding)
    got = _logits_after(decoder, params, prefix, tokens_BT, mask_BT)
    assert distance(got, wanted, mask_BT) <= DECODING_TOLERANCE


# 19 tokens in three pieces of at most 7; after 9 of padding the first piece holds nothing else.
@pytest.mark.parametrize(("padding", "chunk"), [(0, 7), (9, 4)])
@pytest.mark.parametrize("case", CASES)
def test_a_prefix_may_be_read_in_pieces(load, case, padding, chunk):
    decoder, params = load(case)
    tokens_BT, mask_BT = rows(4, (4, 2, 1), "right")
    whole, pieces = (prefix_of(decoder, params, padding=padding, chunk=n) for n in (64, chunk))
    assert jax.tree.map(np.shape, pieces) == jax.tree.map(np.shape, whole)
    wanted, got = (_logits_after(decoder, params, p, tokens_BT, mask_BT) for p in (whole, pieces))
    assert distance(got, wanted, mask_BT) <= DECODING_TOLERANCE


@pytest.mark.parametrize("case", ["gemma3", "llama"])
def test_decoding_after_a_shared_prefix(load, case):
    decoder, params = load(case)
    tokens_BT, mask_BT = rows(13, (13, 9, 4), "left")
    prefix = prefix_of(decoder, params)
    wanted = _logits_after(decoder, params, prefix, tokens_BT, mask_BT)
    got = read_in_parts(decoder, params, tokens_BT, mask_BT, (6,), prefix)
    assert distance(got, wanted, mask_BT) <= DECODING_TOLERANCE


def test_what_of_a_prefix_is_kept(load):
    decoder, params = load("gemma3")
    prefix = prefix_of(decoder, params, padding=6)
    assert int(prefix.length) == len(PREFIX_P)
    assert prefix.global_layers.k_LSGC.shape == (1, 25, 2, 16)  # no axis of rows
    assert prefix.local_layers.k_LSGC.shape == (2, 5, 2, 16)
    assert sorted(prefix.local_layers.positions_S.tolist()) == [14, 15, 16, 17, 18]


def test_another_prefix_and_none_are_told_apart(load):
    decoder, params = load("gemma3")
    tokens_BT, mask_BT = rows(13, (13, 9), "right")
    logits = _logits_after(decoder, params, prefix_of(decoder, params), tokens_BT, mask_BT)
    changed_P = PREFIX_P.copy()
    changed_P[0] += 1  # beyond every window: only global layers see it
    changed = prefix_of(decoder, params, changed_P)
    for other in (changed, None):
        others = _logits_after(decoder, params, other, tokens_BT, mask_BT)
        assert np.abs(np.asarray(others - logits))[mask_BT].max(axis=-1).min() > 1e-4


def test_sharing_a_prefix_costs_no_more_precision_than_copies(load):
    decoder, params = load("gemma3")
    tokens_BT, mask_BT = rows(13, (13, 9, 4), "right")
    whole = with_prefix(PREFIX_P, tokens_BT, mask_BT)
    exact = decoder_logits(decoder, params, *whole)[:, len(PREFIX_P) :]
    low = dataclasses.replace(decoder, compute_dtype=jnp.bfloat16)
    copies = decoder_logits(low, params, *whole)[:, len(PREFIX_P) :]
    shared = _logits_after(low, params, prefix_of(low, params), tokens_BT, mask_BT)
    error_of_copies = distance(copies, exact, mask_BT)
    assert error_of_copies > 1e-3
    assert distance(shared, exact, mask_BT) <= 2 * error_of_copies
