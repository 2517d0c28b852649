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
