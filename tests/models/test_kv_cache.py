"""Reading with a cache, or after a shared prefix, against reading it all at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax.models.decoder import read_prefix
from gkdjax.models.kv_cache import init_cache
from tests.models.model_cases import (
    LOCAL,
    SLIDING,
    decoder_logits,
    distance,
    pairs_of,
    rows,
)

CASES = {
    "gemma3": ("gemma3", {}),
    "all local": ("gemma3", {"layer_types": [LOCAL] * 3}),
    "window of one": ("gemma3", {"sliding_window": 1}),
    "long window": ("gemma3", {"sliding_window": 64}),
    "qwen3": ("qwen3", SLIDING),
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {}),
}
DECODING_TOLERANCE = 1e-4  # other programs, other orders of summation
PREFIX_P = np.random.default_rng(7).integers(3, 100, 19).astype(np.int32)
load = pairs_of(CASES)
_read_prefix = jax.jit(read_prefix, static_argnames=("decoder", "chunk"))


def prefix_of(decoder, params, prefix_P=PREFIX_P, padding: int = 0, chunk: int = 64):
    tokens_1P = np.concatenate([np.zeros(padding, np.int32), prefix_P])[None]
    mask_1P = (np.arange(tokens_1P.shape[1]) >= padding)[None]
    return _read_prefix(decoder, params, tokens_1P, mask_1P, chunk=chunk)


def after_copies(decoder, params, tokens_BT, mask_BT) -> np.ndarray:
    """Logits [B,T,V] of rows, padded on the right, each of which reads the prefix itself."""
    copies = np.broadcast_to(PREFIX_P, (len(tokens_BT), len(PREFIX_P)))
    whole = np.concatenate([copies, tokens_BT], 1), np.concatenate([copies > 0, mask_BT], 1)
    return decoder_logits(decoder, params, *whole)[:, len(PREFIX_P) :]


@functools.partial(jax.jit, static_argnums=0)
def _extend(decoder, params, cache, tokens_BT, mask_BT, prefix):
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
        part, cache = _extend(decoder, params, cache, *read, prefix)
        logits.append(part)
        start += length
    assert int(cache.columns) == T
    np.testing.assert_array_equal(cache.real_B, mask_BT.sum(1))
    return np.concatenate(logits, axis=1)


# A first part longer than the window of 5, then parts shorter, as long, and longer than it.
@pytest.mark.parametrize("after_prefix", [False, True])
@pytest.mark.parametrize(
    ("case", "parts"),
    [
        *(("gemma3", (12,)), ("all local", (3, 4, 5, 7)), ("window of one", (3, 4, 5, 7))),
        *(("long window", (1,)), ("qwen3", (3, 4, 5, 7)), ("llama", (12,))),
    ],
)
def test_cache_equals_the_uncached_forward(load, case, parts, after_prefix):
    _, decoder, params = load(case)
    tokens_BT, mask_BT = rows(24, (24, 17, 13), "left")
    prefix = prefix_of(decoder, params) if after_prefix else None
    wanted = decoder_logits(decoder, params, tokens_BT, mask_BT, prefix)
    mask_BT[1, 22:] = False  # a row that has stopped, as in the sampler
    got = read_in_parts(decoder, params, tokens_BT, mask_BT, parts, prefix)
    assert distance(got, wanted, mask_BT) <= DECODING_TOLERANCE


@pytest.mark.parametrize("case", ["gemma3", "long window", "qwen3", "llama"])
def test_a_prefill_leaves_the_cache_that_reading_leaves(load, case):
    _, decoder, params = load(case)
    tokens_BT, mask_BT = rows(13, (13, 9, 4), "left")
    variables, read = {"params": params}, (tokens_BT, mask_BT)
    prefix = prefix_of(decoder, params)
    hidden, cache = decoder.apply(variables, *read, 16, prefix, method="prefill")
    empty = init_cache(decoder.spec, 3, 16, jnp.float32)
    wanted_hidden, wanted = decoder.apply(variables, *read, empty, prefix, method="extend")
    assert distance(hidden, wanted_hidden, mask_BT) <= DECODING_TOLERANCE

    def without_padding(stack):  # it sees nothing, and what stands in its slot means nothing
        real = stack.mask[None, :, :, None, None]
        return stack._replace(k=stack.k * real, v=stack.v * real)

    kinds = ("global_layers", "local_layers")
    for got, other in ((getattr(cache, kind), getattr(wanted, kind)) for kind in kinds):
        if got is not None:
            same = functools.partial(np.testing.assert_allclose, atol=1e-4)
            jax.tree.map(same, without_padding(got), without_padding(other))


# Rows shorter than the window of 5 see the prefix in local layers; longer ones pass it. The prefix
# of 19 tokens is read whole or in pieces; after 9 of padding the first piece holds nothing else.
@pytest.mark.parametrize(
    ("case", "length", "padding", "chunk"),
    [
        *(("gemma3", 4, 0, 64), ("gemma3", 13, 6, 7), ("gemma3", 4, 9, 4)),
        *(("all local", 13, 0, 7), ("all local", 4, 9, 4), ("window of one", 4, 6, 7)),
        *(("long window", 13, 9, 4), ("qwen3", 13, 6, 7), ("qwen2", 4, 0, 7), ("llama", 13, 9, 4)),
    ],
)
def test_a_shared_prefix_equals_one_of_each_row(load, case, length, padding, chunk):
    _, decoder, params = load(case)
    tokens_BT, mask_BT = rows(length, (length, length - 2, 1), "right")
    wanted = after_copies(decoder, params, tokens_BT, mask_BT)
    prefix = prefix_of(decoder, params, padding=padding, chunk=chunk)
    got = decoder_logits(decoder, params, tokens_BT, mask_BT, prefix)
    assert distance(got, wanted, mask_BT) <= DECODING_TOLERANCE


def test_local_layers_keep_no_more_than_the_window(load):
    _, decoder, params = load("gemma3")
    cache = init_cache(decoder.spec, 2, 100, jnp.bfloat16)
    assert cache.global_layers.k.shape == (1, 2, 100, 2, 16)
    assert cache.local_layers.k.shape == (2, 2, 5, 2, 16)
    assert cache.local_layers.v.dtype == jnp.bfloat16
    prefix = prefix_of(decoder, params, padding=6)
    assert prefix.real_B.tolist() == [len(PREFIX_P)]
    assert prefix.global_layers.k.shape == (1, 1, 25, 2, 16)
    assert prefix.local_layers.k.shape == (2, 1, 5, 2, 16)
    assert sorted(prefix.local_layers.positions[0].tolist()) == [14, 15, 16, 17, 18]


def test_sharing_a_prefix_costs_no_more_precision_than_copies(load):
    _, decoder, params = load("gemma3")
    tokens_BT, mask_BT = rows(13, (13, 9, 4), "right")
    exact = after_copies(decoder, params, tokens_BT, mask_BT)
    low = dataclasses.replace(decoder, compute_dtype=jnp.bfloat16)
    error_of_copies = distance(after_copies(low, params, tokens_BT, mask_BT), exact, mask_BT)
    shared = decoder_logits(low, params, tokens_BT, mask_BT, prefix_of(low, params))
    assert error_of_copies > 1e-3
    assert distance(shared, exact, mask_BT) <= 2 * error_of_copies
