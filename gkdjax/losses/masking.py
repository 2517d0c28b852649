"""Reductions over the tokens that count: one definition of sum, count and mean for everything.

A mask has the shape of what it masks. True or 1 keeps an element, False or 0 removes it, any other
non-negative number is its weight. What a zero removes may be NaN or infinite: it reaches neither
the value nor the gradient, because it is replaced (`jnp.where`) and not multiplied away.
"""

import chex
import jax
import jax.numpy as jnp


def masked_sum(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum of `mask * x` over every axis.

    Args:
      x: any shape, any real dtype; added up in float32.
      mask: same shape; bool, 0/1 or non-negative weights.

    Returns:
      A float32 scalar; 0 for an empty mask.

    Raises:
      AssertionError: the shapes differ.
    """
    chex.assert_equal_shape([x, mask], custom_message="x and mask need one shape")
    weights = jnp.asarray(mask, jnp.float32)
    kept = jnp.where(weights > 0, jnp.asarray(x, jnp.float32), 0.0)
    return jnp.sum(kept * weights)


def masked_count(mask: jax.Array) -> jax.Array:
    """How much the mask keeps: the sum of its weights, a float32 scalar (any shape in)."""
    return jnp.sum(jnp.asarray(mask, jnp.float32))


def example_weights(mask: jax.Array) -> jax.Array:
    """Weights with which a sum over tokens is a sum of each example's mean.

        mask = [[1, 1, 0, 0], [1, 0, 0, 0]]  ->  [[0.5, 0.5, 0, 0], [1, 0, 0, 0]]

    Their `masked_count` is the number of examples that have a token: a `masked_mean` with them is a
    mean over examples, long or short.

    Args:
      mask: [..., N]; bool, 0/1 or non-negative weights of an example's tokens.

    Returns:
      float32, the shape of `mask`; 0 for an example without a token.
    """
    weights = jnp.asarray(mask, jnp.float32)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """`masked_sum(x, mask) / masked_count(mask)`, the mean over what the mask keeps.

        x = [0.5, 1.5, nan, 4.0], mask = [1, 1, 0, 0]  ->  1.0

    Over many batches, divide the sum of sums by the sum of counts: a mean of means weighs tokens
    unequally.

    Args:
      x: any shape, any real dtype.
      mask: same shape; bool, 0/1 or non-negative weights.

    Returns:
      A float32 scalar. An empty mask gives NaN on purpose: a batch without a target is an error
      that has to be seen, never a loss of zero.

    Raises:
      AssertionError: the shapes differ.
    """
    return masked_sum(x, mask) / masked_count(mask)
