"""`top_k_logprobs` and the pytree that it returns."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from gkdjax import losses
from tests.losses import numpy_reference as ref
from tests.losses.loss_cases import random_logits


class TopK(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((6, 1, 1.0), (6, 5, 2.0), (6, 6, 0.5), (4096, 64, 1.0))
    def test_against_float64(self, vocabulary, k, temperature):
        spread = np.array([1.0, 30.0])[:, None, None]
        _, logits = random_logits(k, 2, 3, vocabulary, spread=spread)
        top = self.variant(lambda x: losses.top_k_logprobs(x, k, temperature))(logits)
        chex.assert_shape([top.ids, top.logprobs], (2, 3, k))
        chex.assert_type([top.ids, top.logprobs, top.tail_logprob], [jnp.int32, float, float])
        assert top.temperature == temperature
        log_p = ref.log_softmax(np.asarray(logits, np.float64) / temperature)
        order = np.argsort(-log_p, axis=-1, kind="stable")
        np.testing.assert_array_equal(top.ids, order[..., :k])
        expected = np.take_along_axis(log_p, order, -1)
        np.testing.assert_allclose(top.logprobs, expected[..., :k], rtol=1e-6, atol=1e-6)
        if k < vocabulary:
            rest = ref.log_sum_exp(expected[..., k:])[..., 0]
            np.testing.assert_allclose(top.tail_logprob, rest, rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(top.tail_logprob, -np.inf)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ties_go_to_the_lowest_id(dtype):
    logits = jnp.array([1.0, 2.0, 2.0, 1.0, 2.0, 1.0], dtype)
    np.testing.assert_array_equal(losses.top_k_logprobs(logits, 5).ids, [1, 2, 4, 0, 3])


def test_tokens_without_mass_come_out_absent():
    logits = jnp.array([0.0, -jnp.inf, 0.0, -jnp.inf])
    top = losses.top_k_logprobs(logits, 3)
    np.testing.assert_allclose(top.logprobs, [-np.log(2), -np.log(2), -np.inf], rtol=1e-6)
    assert top.tail_logprob == -jnp.inf


def test_top_k_sees_float32():
    jaxpr = jax.make_jaxpr(lambda x: losses.top_k_logprobs(x, 2))(jnp.zeros((3, 8), jnp.bfloat16))
    (equation,) = [e for e in jaxpr.eqns if e.primitive.name == "top_k"]
    assert equation.invars[0].aval.dtype == jnp.float32


def test_is_a_pytree_with_a_static_temperature():
    top = losses.top_k_logprobs(jnp.arange(12.0).reshape(3, 4), 2, temperature=0.5)
    assert len(jax.tree.leaves(top)) == 3
    assert len(jax.tree.leaves(losses.TopKLogprobs(top.ids, top.logprobs))) == 2
    first = jax.jit(lambda t: jax.tree.map(lambda x: x[0], t))(top)
    assert isinstance(first, losses.TopKLogprobs)
    assert first.temperature == 0.5
    chex.assert_trees_all_equal(first, jax.tree.map(lambda x: x[0], top))


def test_traces_again_for_another_temperature():
    student = jnp.arange(4.0)
    loss = jax.jit(lambda s, t: losses.topk_forward_kl(s, t, tail="renormalize"))
    warm, cold = (losses.top_k_logprobs(jnp.arange(4.0), 3, temperature=t) for t in (2.0, 0.5))
    relabelled = losses.TopKLogprobs(warm.ids, warm.logprobs, warm.tail_logprob, 0.5)
    assert loss(student, cold) < 1e-6
    assert loss(student, relabelled) > 1e-2
