"""`top_k_logprobs`, its search for the K best, and the pytree that it returns."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdjax import losses
from gkdjax.losses.topk import top_k
from tests.losses import numpy_reference as ref
from tests.losses.loss_cases import random_logits

_search = jax.jit(top_k, static_argnums=1)


def stable(x, k):
    """Ids, best first, the lowest first among equals."""
    return np.argsort(-np.asarray(x, np.float64), axis=-1, kind="stable")[..., :k]


class TopK(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((6, 1, 1.0), (6, 5, 2.0), (6, 6, 0.5), (4096, 64, 1.0))
    def test_against_float64(self, vocabulary, k, temperature):
        _, logits = random_logits(k, 2, 3, vocabulary, spread=np.array([1.0, 30.0])[:, None, None])
        top = self.variant(lambda x: losses.top_k_logprobs(x, k, temperature))(logits)
        chex.assert_shape([top.ids, top.logprobs], (2, 3, k))
        chex.assert_type([top.ids, top.logprobs, top.tail_logprob], [jnp.int32, float, float])
        assert top.temperature == temperature
        log_p = ref.log_softmax(np.asarray(logits, np.float64) / temperature)
        order = stable(log_p, vocabulary)
        np.testing.assert_array_equal(top.ids, order[..., :k])
        expected = np.take_along_axis(log_p, order, -1)
        np.testing.assert_allclose(top.logprobs, expected[..., :k], rtol=1e-6, atol=1e-6)
        rest = ref.log_sum_exp(expected[..., k:])[..., 0] if k < vocabulary else -np.inf
        np.testing.assert_allclose(top.tail_logprob, rest, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ties_go_to_the_lowest_id(dtype):
    logits = jnp.array([1.0, 2.0, 2.0, 1.0, 2.0, 1.0], dtype)
    np.testing.assert_array_equal(losses.top_k_logprobs(logits, 5).ids, [1, 2, 4, 0, 3])


def test_tokens_without_mass_come_out_absent():
    logits = jnp.array([0.0, -jnp.inf, 0.0, -jnp.inf])
    top = losses.top_k_logprobs(logits, 3)
    np.testing.assert_allclose(top.logprobs, [-np.log(2), -np.log(2), -np.inf], rtol=1e-6)
    assert top.tail_logprob == -jnp.inf


def test_is_a_pytree_with_a_static_temperature():
    top = losses.top_k_logprobs(jnp.arange(12.0).reshape(3, 4), 2, temperature=0.5)
    assert len(jax.tree.leaves(top)) == 3
    assert len(jax.tree.leaves(losses.TopKLogprobs(top.ids, top.logprobs))) == 2
    first = jax.jit(lambda t: jax.tree.map(lambda x: x[0], t))(top)
    assert isinstance(first, losses.TopKLogprobs) and first.temperature == 0.5
    chex.assert_trees_all_equal(first, jax.tree.map(lambda x: x[0], top))


def test_traces_again_for_another_temperature():
    student = jnp.arange(4.0)
    loss = jax.jit(lambda s, t: losses.topk_forward_kl(s, t, tail="renormalize"))
    warm, cold = (losses.top_k_logprobs(jnp.arange(4.0), 3, temperature=t) for t in (2.0, 0.5))
    relabelled = losses.TopKLogprobs(warm.ids, warm.logprobs, warm.tail_logprob, 0.5)
    assert loss(student, cold) < 1e-6
    assert loss(student, relabelled) > 1e-2


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), levels=st.sampled_from([2, 5, 1000]))
def test_ties_across_blocks_go_to_the_lowest_id(seed, levels):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, levels, (3, 2000)).astype(np.float32)
    x[rng.random(x.shape) < 0.3] = -np.inf
    values, ids = _search(x, 7)
    np.testing.assert_array_equal(ids, stable(x, 7))
    np.testing.assert_array_equal(values, np.take_along_axis(x, np.asarray(ids), -1))


@pytest.mark.parametrize(
    ("vocabulary", "order"),
    [(1793, np.sort), (1792, lambda x: -np.sort(x)), (1791, np.zeros_like), (4097, np.array)],
)
def test_vocabularies_about_a_block_long_and_sorted_ones(vocabulary, order):
    x = np.random.default_rng(vocabulary).permutation(vocabulary).astype(np.float32)
    x = order(x)[None]
    np.testing.assert_array_equal(_search(x, 7)[1], stable(x, 7))


def test_fewer_finite_values_than_k_bring_ids_of_the_vocabulary():
    x = np.full((1, 3000), -np.inf, np.float32)  # the last block is not full
    x[0, [5, 2999]] = 1.0
    values, ids = _search(x, 9)
    assert ids[0, :2].tolist() == [5, 2999] and (values[0, 2:] == -np.inf).all()
    assert (np.asarray(ids) < 3000).all() and len(set(ids[0].tolist())) == 9


def test_bfloat16_logits_are_searched_in_float32():
    x = np.random.default_rng(0).normal(size=(2, 20_000)).astype(np.float32)
    rounded = jnp.asarray(x, jnp.bfloat16)  # many ties
    found = losses.top_k_logprobs(rounded, 20)
    np.testing.assert_array_equal(found.ids, stable(rounded.astype(jnp.float32), 20))
    jaxpr = jax.make_jaxpr(lambda x: losses.top_k_logprobs(x, 2))(jnp.zeros((3, 8), jnp.bfloat16))
    (equation,) = [e for e in jaxpr.eqns if e.primitive.name == "top_k"]
    assert equation.invars[0].aval.dtype == jnp.float32


def test_it_does_not_sort_the_whole_vocabulary():
    text = str(jax.make_jaxpr(lambda x: top_k(x, 8))(jnp.zeros((2, 262_144))))
    assert "f32[2,2048]" in text  # the blocks' largest
    searched = [line for line in text.splitlines() if " top_k[" in line]
    assert len(searched) == 2 and not any("262144" in line for line in searched)


def test_within_moves_what_the_student_lacks_to_the_tail():
    logits = np.random.default_rng(3).standard_normal((2, 30)) * 3
    p = np.exp(ref.log_softmax(logits))
    top = losses.top_k_logprobs(jnp.asarray(logits), 12)
    inside = losses.within(top, 20)
    kept = np.asarray(top.ids) < 20
    assert kept.any() and not kept.all()
    np.testing.assert_array_equal(inside.logprobs != -np.inf, kept)
    left = 1 - np.where(kept, np.take_along_axis(p, np.asarray(top.ids), -1), 0).sum(axis=-1)
    np.testing.assert_allclose(np.exp(inside.tail_logprob), left, rtol=1e-5)
    without_tail = losses.TopKLogprobs(top.ids, top.logprobs)
    assert losses.within(without_tail, 20).tail_logprob is None  # it is what the others leave
    assert losses.within(top, None) is top
