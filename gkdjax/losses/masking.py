"""Reductions over the tokens that count.

A mask has the shape of what it masks: bool, 0/1 or non-negative weights. An element of weight 0 may
be NaN or infinite: it is replaced (`jnp.where`) and not multiplied away, so it reaches neither the
value nor the gradient.
"""

import chex
import jax.numpy as jnp
from jax import Array


def masked_sum(x: Array, mask: Array) -> Array:
    """Sums `mask * x` over every axis, in float32; 0 for an empty mask.

    Raises:
      AssertionError: the shapes differ.
    """
    chex.assert_equal_shape([x, mask], custom_message="x and mask need one shape")
    weights = jnp.asarray(mask, jnp.float32)
    kept = jnp.where(weights > 0, jnp.asarray(x, jnp.float32), 0.0)
    return jnp.sum(kept * weights)


def masked_count(mask: Array) -> Array:
    """Sums the weights of a mask of any shape -> a float32 scalar."""
    return jnp.sum(jnp.asarray(mask, jnp.float32))


def example_weights(mask: Array) -> Array:
    """Weights [..., N] with which a sum over tokens is a sum of each example's mean.

        mask = [[1, 1, 0, 0], [1, 0, 0, 0]]  ->  [[0.5, 0.5, 0, 0], [1, 0, 0, 0]]

    Their `masked_count` is the number of examples that have a token, so a `masked_mean` with them
    is a mean over examples. The weights of an example without a token are 0.
    """
    weights = jnp.asarray(mask, jnp.float32)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)


def masked_mean(x: Array, mask: Array) -> Array:
    """`masked_sum(x, mask) / masked_count(mask)`, a float32 scalar.

        x = [0.5, 1.5, nan, 4.0], mask = [1, 1, 0, 0]  ->  1.0

    Over many batches divide the sum of sums by the sum of counts: a mean of means weighs tokens
    unequally. An empty mask gives NaN on purpose: a batch without a target is an error that has to
    be seen, never a loss of zero.

    Raises:
      AssertionError: the shapes differ.
    """
    return masked_sum(x, mask) / masked_count(mask)
