"""Masked reductions, by their identity: f(x, mask) is f(x[mask])."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from gkdjax.losses import example_weights, masked_count, masked_mean, masked_sum


class Identity(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(bool, jnp.int32, jnp.float32)
    def test_equals_what_is_left(self, dtype):
        rng = np.random.default_rng(0)
        x, mask = rng.normal(size=(4, 7, 3)), rng.random((4, 7, 3)) < 0.4
        m = jnp.asarray(mask, dtype)
        for fn, expected in ((masked_sum, x[mask].sum()), (masked_mean, x[mask].mean())):
            value = self.variant(fn)(jnp.asarray(x, jnp.float32), m)
            chex.assert_shape(value, ())
            chex.assert_type(value, jnp.float32)
            np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert self.variant(masked_count)(m) == mask.sum()

    @chex.variants(with_jit=True, without_jit=True)
    def test_weights_of_tokens_and_of_examples(self):
        x, weights = jnp.array([1.0, 2.0, 5.0]), jnp.array([0.5, 0.0, 1.5])
        assert self.variant(masked_sum)(x, weights) == 8.0
        assert self.variant(masked_count)(weights) == 2.0
        assert self.variant(masked_mean)(x, weights) == 4.0
        mask = jnp.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
        weights = self.variant(example_weights)(mask)
        np.testing.assert_array_equal(weights, [[0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
        assert self.variant(masked_count)(weights) == 2.0  # examples that have a token
        x = jnp.array([[1.0, 3.0, np.nan, 0], [0, 4.0, 0, 0], [np.inf, 0, 0, 0]])
        assert self.variant(masked_mean)(x, weights) == 3.0


@pytest.mark.parametrize(
    ("hidden", "dtype"), [(np.nan, bool), (np.inf, jnp.float32), (-np.inf, jnp.float32)]
)
def test_what_is_hidden_reaches_neither_value_nor_gradient(hidden, dtype):
    x, mask = jnp.array([0.5, 1.5, hidden, 4.0]), jnp.array([1, 1, 0, 0], dtype)
    value, grads = jax.value_and_grad(masked_mean)(x, mask)
    assert value == 1.0
    np.testing.assert_array_equal(grads, [0.5, 0.5, 0.0, 0.0])
    assert np.isnan(masked_mean(jnp.array([1.0, np.nan]), jnp.array([True, True])))


def test_bfloat16_is_added_up_in_float32():
    x = jnp.ones((4096,), jnp.bfloat16)
    value = masked_sum(x, jnp.ones((4096,), bool))
    assert value.dtype == jnp.float32
    assert value == masked_count(x) == 4096
    assert jax.grad(lambda x: masked_mean(x, x > 0))(x).dtype == jnp.bfloat16


def test_an_empty_mask_is_nan_and_not_zero():
    nothing = jnp.zeros((3,), bool)
    assert np.isnan(masked_mean(jnp.ones((3,)), nothing))
    assert masked_sum(jnp.ones((3,)), nothing) == masked_count(nothing) == 0
