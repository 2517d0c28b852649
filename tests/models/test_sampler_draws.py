"""Drawing a token: temperature, nucleus and the inverse of a cumulative sum."""

import types

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax.models import sampler, sampling
from gkdjax.models.sampler import sample
from gkdjax.types import SamplingParams

DRAWS, VOCAB = 8192, 12


@pytest.fixture(scope="module")
def small():
    """.frequencies(temperature, top_p[, top_k]) of the first tokens of 8,192 seeds, and .logits."""
    decoder, params = builders.small_model(seed=3, vocab_size=VOCAB)
    prompt = np.array([4, 7, 9], np.int32)
    variables = {"params": params}
    hidden = decoder.apply(variables, prompt[None], np.ones((1, 3), bool))
    logits = decoder.apply(variables, hidden, method="unembed")

    def frequencies(*how):
        drawn = sample(
            *(decoder, params, [prompt] * DRAWS, range(DRAWS), SamplingParams(1, *how)),
            **{"stop_ids": (0,), "batch_size": 2048, "lengths": (3,)},
        )
        return np.bincount([int(t.ids[0]) for t in drawn], minlength=VOCAB) / DRAWS

    return types.SimpleNamespace(
        frequencies=frequencies, logits=np.asarray(logits[0, -1], np.float64)
    )


def probabilities(logits, temperature, top_p, top_k=None):
    p = np.exp(logits / temperature - np.max(logits / temperature))
    order = np.argsort(-p, kind="stable")
    p[order[top_k:]] *= top_k is None
    p /= p.sum()
    size = np.searchsorted(np.cumsum(p[order]), top_p) + 1  # the first sum that reaches top_p
    kept = np.zeros_like(p)
    kept[order[:size]] = p[order[:size]]
    return kept / kept.sum()


def test_draws_follow_temperature_and_nucleus_without_compiling_again(small):
    seen, compiled = [], None
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.6), (2.0, 0.8)):
        got = small.frequencies(temperature, top_p)
        wanted = probabilities(small.logits, temperature, top_p)
        possible = wanted > 0
        assert possible.sum() == VOCAB if top_p == 1 else 2 <= possible.sum() < VOCAB
        assert not got[~possible].any()
        chi = DRAWS * ((got - wanted)[possible] ** 2 / wanted[possible]).sum()
        assert chi < 33, (temperature, top_p)  # 11 degrees of freedom: p < 0.001 at 31.3
        assert all(np.abs(got - other).sum() > 0.15 for other in seen)
        seen.append(got)
        compiled = compiled or sampler._generate._cache_size()
    for temperature, top_p in ((0.0, 1.0), (1e-3, 0.5), (1.0, 1e-9)):  # all of them greedy
        assert small.frequencies(temperature, top_p)[small.logits.argmax()] == 1.0
    assert sampler._generate._cache_size() == compiled


def test_draws_follow_the_top_k_and_then_the_nucleus_of_what_it_leaves(small):
    seen = []
    for temperature, top_p, top_k in ((1.0, 1.0, 3), (2.0, 1.0, 5), (2.0, 0.8, 5), (1.0, 0.9, 6)):
        got = small.frequencies(temperature, top_p, top_k)
        wanted = probabilities(small.logits, temperature, top_p, top_k)
        possible = wanted > 0
        assert possible.sum() == top_k if top_p == 1 else 2 <= possible.sum() < top_k
        assert not got[~possible].any()
        chi = DRAWS * ((got - wanted)[possible] ** 2 / wanted[possible]).sum()
        assert chi < 19, (temperature, top_p, top_k)  # 4 degrees of freedom: p < 0.001 at 18.5
        # The order matters: the nucleus of all tokens, cut to k of them, is another distribution.
        seen.append(got)
    assert all(np.abs(a - b).sum() > 0.1 for i, a in enumerate(seen) for b in seen[:i])
    for how in ((1.0, 1.0, 1), (0.0, 1.0, 3)):
        assert small.frequencies(*how)[small.logits.argmax()] == 1.0
    np.testing.assert_array_equal(
        small.frequencies(1.0, 0.9, VOCAB + 1), small.frequencies(1.0, 0.9)
    )


def test_the_top_k_takes_the_lowest_ids_among_equals():
    """And the nucleus of what it leaves, in the same order: NumPy's stable sort says which."""
    rng = np.random.default_rng(0)
    logits_BV = np.log(rng.multinomial(64, np.full(40, 1 / 40), size=4) + 1.0).astype(np.float32)
    keys = jax.vmap(jax.random.key)(np.arange(4000))
    draw = jax.jit(sampling.sample_token, static_argnames="top_k")
    for row_V in logits_BV:
        for top_k, top_p in ((7, 1.0), (7, 0.55), (40, 1.0), (99, 1.0)):
            p = probabilities(row_V.astype(np.float64), 1.0, top_p - 1e-6, top_k)
            drawn = draw(
                *(np.broadcast_to(row_V, (4000, 40)), keys, np.float32(1), top_k),
                np.float32(top_p),
            )
            assert {*drawn.tolist()} == {*np.flatnonzero(p).tolist()}, (top_k, top_p)


def test_inversion_never_gives_a_token_of_probability_zero():
    probs_BV = jnp.asarray([[0.0, 0.3, 0.0, 0.7, 0.0]] * 4, jnp.float32)
    ends_B = jnp.asarray([0.0, 0.299, 0.301, np.nextafter(np.float32(1), np.float32(0))])
    assert sampling._invert(probs_BV, ends_B).tolist() == [1, 1, 3, 3]


def test_rounding_in_the_sum_draws_no_token_of_probability_zero():
    rng = np.random.default_rng(0)
    possible_BV = rng.random((64, 4096)) < 0.1
    possible_BV &= np.arange(4096) < rng.integers(2000, 4096, (64, 1))
    probs_BV = (rng.random((64, 4096)) * possible_BV).astype(np.float32)
    sums_BV = np.asarray(jnp.cumsum(jnp.asarray(probs_BV), axis=-1))
    rises_BV = (np.diff(sums_BV) > 0) & ~possible_BV[:, 1:]
    before_rise_B = sums_BV[np.arange(64), rises_BV.argmax(axis=-1)]
    for uniform_B in (before_rise_B / sums_BV[:, -1], np.full(64, 1 - 2**-24, np.float32)):
        drawn_B = sampling._invert(jnp.asarray(probs_BV), jnp.asarray(uniform_B))
        assert possible_BV[np.arange(64), drawn_B].all()


def test_the_nucleus_is_that_of_a_stable_sort():
    """In units of 1/1024, so that sums are exact: many tokens are equal, some are 0."""
    rng = np.random.default_rng(0)
    probs_BV = rng.multinomial(1024, rng.dirichlet(np.full(300, 0.7), size=4)) / 1024
    order_BV = np.argsort(-probs_BV, axis=-1, kind="stable")
    sorted_BV = np.take_along_axis(probs_BV, order_BV, axis=-1)
    for top_p in (1e-9, 1 / 1024, 0.25, 0.5, 0.5 + 1 / 2048, 0.9, 1023 / 1024, 1 - 2**-20):
        inside_BV = np.cumsum(sorted_BV, axis=-1) - sorted_BV < top_p
        wanted_BV = np.zeros_like(probs_BV)
        np.put_along_axis(wanted_BV, order_BV, sorted_BV * inside_BV, axis=-1)
        got_BV = sampling._nucleus(jnp.asarray(probs_BV, jnp.float32), jnp.float32(top_p))
        np.testing.assert_array_equal(got_BV, wanted_BV)
    one = sampling._nucleus(jnp.asarray([[0.0, 1.0, 0.0]]), jnp.float32(0.9))
    assert one.tolist() == [[0.0, 1.0, 0.0]]
    some_BV = jax.nn.softmax(jnp.asarray(rng.standard_normal((8, 300)), jnp.float32))
    assert (some_BV == sampling._least_reaching(some_BV, 0.7)).any(axis=-1).all()
