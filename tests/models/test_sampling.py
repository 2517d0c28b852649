"""Sampling a token: temperature, top k, nucleus and the inverse of a cumulative sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax.models import sampling

SAMPLES, VOCAB = 8192, 12
LOGITS = np.random.default_rng(7).standard_normal(VOCAB)
_sample = jax.jit(sampling.sample_token, static_argnames="top_k")


def frequencies(temperature, top_p, top_k=None, logits=LOGITS, samples=SAMPLES) -> np.ndarray:
    logits_BV = np.broadcast_to(logits.astype(np.float32), (samples, len(logits)))
    keys_B = jax.vmap(jax.random.key)(np.arange(samples))
    got = _sample(logits_BV, keys_B, np.float32(temperature), top_k, np.float32(top_p))
    return np.bincount(got, minlength=len(logits)) / samples


def probabilities(logits, temperature, top_p, top_k=None) -> np.ndarray:
    p = np.exp(logits / temperature - np.max(logits / temperature))
    order = np.argsort(-p, kind="stable")
    p[order[top_k:]] *= top_k is None
    p /= p.sum()
    size = np.searchsorted(np.cumsum(p[order]), top_p) + 1  # the first sum that reaches top_p
    inside = np.zeros_like(p)
    inside[order[:size]] = p[order[:size]]
    return inside / inside.sum()


# The order matters: the nucleus of all tokens, cut to k of them, is another distribution.
HOW = [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.6), (2.0, 0.8)]
HOW += [(1.0, 1.0, 3), (2.0, 1.0, 5), (2.0, 0.8, 5), (1.0, 0.9, 6)]


def test_samples_follow_temperature_top_k_and_the_nucleus_of_what_it_leaves():
    seen = []
    for how in HOW:
        got, wanted = frequencies(*how), probabilities(LOGITS, *how)
        possible, most = wanted > 0, how[2] if len(how) == 3 else VOCAB
        assert possible.sum() == most if how[1] == 1 else 2 <= possible.sum() < most
        assert not got[~possible].any()
        chi = SAMPLES * ((got - wanted)[possible] ** 2 / wanted[possible]).sum()
        assert chi < 33, how  # 11 degrees of freedom: p < 0.001 at 31.3
        assert all(np.abs(got - other).sum() > 0.1 for other in seen)
        seen.append(got)
    assert _sample._cache_size() == 4  # of no and of three top ks
    for greedy in ((0.0, 1.0), (1e-3, 0.5), (1.0, 1e-9), (1.0, 1.0, 1), (0.0, 1.0, 3)):
        assert frequencies(*greedy)[LOGITS.argmax()] == 1.0
    np.testing.assert_array_equal(frequencies(1.0, 0.9, VOCAB + 1), frequencies(1.0, 0.9))


@pytest.mark.parametrize(("top_k", "top_p"), [(7, 1.0), (7, 0.55), (40, 1.0), (99, 1.0)])
def test_the_top_k_takes_the_lowest_ids_among_equals(top_k, top_p):
    """And the nucleus of what it leaves, in the same order: NumPy's stable sort says which."""
    rng = np.random.default_rng(0)
    for row_V in np.log(rng.multinomial(64, np.full(40, 1 / 40), size=4) + 1.0):
        wanted = probabilities(row_V, 1.0, top_p - 1e-6, top_k) > 0
        np.testing.assert_array_equal(frequencies(1.0, top_p, top_k, row_V, 4000) > 0, wanted)


def test_inversion_never_gives_a_token_of_probability_zero():
    probs_BV = jnp.asarray([[0.0, 0.3, 0.0, 0.7, 0.0]] * 4, jnp.float32)
    ends_B = jnp.asarray([0.0, 0.299, 0.301, np.nextafter(np.float32(1), np.float32(0))])
    assert sampling._invert(probs_BV, ends_B).tolist() == [1, 1, 3, 3]
    # Rounding may lift the sum at a token of probability 0.
    rng = np.random.default_rng(0)
    possible_BV = rng.random((64, 4096)) < 0.1
    possible_BV &= np.arange(4096) < rng.integers(2000, 4096, (64, 1))
    probs_BV = (rng.random((64, 4096)) * possible_BV).astype(np.float32)
    sums_BV = np.asarray(jnp.cumsum(jnp.asarray(probs_BV), axis=-1))
    rises_BV = (np.diff(sums_BV) > 0) & ~possible_BV[:, 1:]
    before_rise_B = sums_BV[np.arange(64), rises_BV.argmax(axis=-1)]
    for uniform_B in (before_rise_B / sums_BV[:, -1], np.full(64, 1 - 2**-24, np.float32)):
        at_B = sampling._invert(jnp.asarray(probs_BV), jnp.asarray(uniform_B))
        assert possible_BV[np.arange(64), at_B].all()


def test_the_nucleus_is_that_of_a_stable_sort():
    """In units of 1/1024, so that sums are exact: many tokens are equal, some are 0."""
    rng = np.random.default_rng(0)
    probs_BV = rng.multinomial(1024, rng.dirichlet(np.full(300, 0.7), size=4)) / 1024
    order_BV = np.argsort(-probs_BV, axis=-1, kind="stable")
    sorted_BV = np.take_along_axis(probs_BV, order_BV, axis=-1)
    nucleus = functools.partial(sampling._nucleus, jnp.asarray(probs_BV, jnp.float32))
    for top_p in (1e-9, 1 / 1024, 0.25, 0.5, 0.5 + 1 / 2048, 0.9, 1023 / 1024, 1 - 2**-20):
        inside_BV = np.cumsum(sorted_BV, axis=-1) - sorted_BV < top_p
        wanted_BV = np.zeros_like(probs_BV)
        np.put_along_axis(wanted_BV, order_BV, sorted_BV * inside_BV, axis=-1)
        np.testing.assert_array_equal(nucleus(jnp.float32(top_p)), wanted_BV)
    one = sampling._nucleus(jnp.asarray([[0.0, 1.0, 0.0]]), jnp.float32(0.9))
    assert one.tolist() == [[0.0, 1.0, 0.0]]
    some_BV = jax.nn.softmax(jnp.asarray(rng.standard_normal((8, 300)), jnp.float32))
    assert (some_BV == sampling._least_reaching(some_BV, 0.7)).any(axis=-1).all()
