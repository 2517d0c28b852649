"""The search for the K best: block by block, and yet the answer of `jax.lax.top_k`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdjax import losses
from gkdjax.losses.topk import top_k

_search = jax.jit(top_k, static_argnums=1)


def stable(x, k):
    """Best first, the lowest id first among equals."""
    return np.argsort(-np.asarray(x, np.float64), axis=-1, kind="stable")[..., :k]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), levels=st.sampled_from([2, 5, 1000]))
def test_ties_across_blocks_go_to_the_lowest_id(seed, levels):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, levels, (3, 2000)).astype(np.float32)
    x[rng.random(x.shape) < 0.3] = -np.inf
    values, ids = _search(x, 7)
    np.testing.assert_array_equal(ids, stable(x, 7))
    np.testing.assert_array_equal(values, np.take_along_axis(x, np.asarray(ids), -1))


@pytest.mark.parametrize("vocabulary", [1793, 1792, 1791, 2048, 4097])
@pytest.mark.parametrize("order", ["ascending", "descending", "random", "all equal"])
def test_traps(vocabulary, order):
    x = np.random.default_rng(vocabulary).permutation(vocabulary).astype(np.float32)
    x = {"ascending": np.sort(x), "descending": -np.sort(x), "random": x}.get(order, x * 0)
    _, ids = _search(x[None], 7)
    np.testing.assert_array_equal(ids, stable(x[None], 7))


def test_fewer_finite_values_than_k_bring_ids_of_the_vocabulary():
    x = np.full((1, 3000), -np.inf, np.float32)  # the last block is not full
    x[0, [5, 2999]] = 1.0
    values, ids = _search(x, 9)
    assert ids[0, :2].tolist() == [5, 2999] and (values[0, 2:] == -np.inf).all()
    assert (np.asarray(ids) < 3000).all() and len(set(ids[0].tolist())) == 9


def test_bfloat16_logits_of_a_large_vocabulary():
    x = np.random.default_rng(0).normal(size=(2, 20_000)).astype(np.float32)
    rounded = jnp.asarray(x, jnp.bfloat16)  # many ties
    found = losses.top_k_logprobs(rounded, 20)
    np.testing.assert_array_equal(found.ids, stable(rounded.astype(jnp.float32), 20))


def test_it_does_not_put_the_whole_vocabulary_in_order():
    text = str(jax.make_jaxpr(lambda x: top_k(x, 8))(jnp.zeros((2, 262_144))))
    assert "f32[2,2048]" in text  # the blocks' largest
    searched = [line for line in text.splitlines() if " top_k[" in line]
    assert len(searched) == 2 and not any("262144" in line for line in searched)
