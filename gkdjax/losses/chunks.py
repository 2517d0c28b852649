"""Tokens a chunk at a time, those that count first, so that no [tokens, vocabulary] array exists.

Shape letters: B rows, N tokens of a row, S shards, M = B N / S tokens of a shard, C of a chunk.
"""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How tokens are cut.

    Attributes:
      size: tokens of a shard that are computed at once; fewer if there are not so many.
      shards: parts that the rows B are cut in, as many as devices share them: each is put in order
        and cut by itself, so that no token leaves its device.
    """

    size: int
    shards: int

    def check(self, rows: int) -> None:
        """Raises ValueError for a number of shards that `rows` rows cannot be cut in."""
        if not isinstance(self.shards, numbers.Integral) or self.shards < 1 or rows % self.shards:
            raise ValueError(f"shards must divide the {rows} rows, got {self.shards!r}")


def over_chunks(
    body: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    tokens: Any,
    mask_BN: jax.Array,
    chunks: Chunks,
) -> tuple[Any, Any]:
    """Runs `body` over chunks of the tokens that the mask keeps; the others cost nothing.

        mask 1 0 1 1 0 1, size 2  ->  tokens (0, 2), then (3, 5)

    As many chunks are computed as hold a token, a number known only when it runs, so reverse-mode
    differentiation cannot pass through: gradients are made in `body`.

    Args:
      body: (carry, chunk) -> (carry, outputs); `chunk` is `tokens` with leaves [S,C,...], all zero
        for what fills up the last one, and the outputs' leaves are [S,C,...].
      carry: any pytree of arrays.
      tokens: a pytree of leaves [B,N,...].
      mask_BN: bool.
      chunks: how to cut.

    Returns:
      (carry, outputs with leaves [B,N,...], zero where the mask is False).
    """
    B, N = mask_BN.shape
    chunks.check(B)
    S, M = chunks.shards, B * N // chunks.shards
    size = min(chunks.size, M)
    tokens = jax.tree.map(lambda x: x.reshape(S, M, *x.shape[2:]), tokens)
    order, count = _valid_first(mask_BN.reshape(S, M), size)

    def places(i):
        return jax.lax.dynamic_slice_in_dim(order, i * size, size, axis=1)

    def one_chunk(i, state):
        carry, outputs = state
        at_SC = places(i)
        carry, new = body(carry, jax.tree.map(lambda x: _take(x, at_SC), tokens))
        return carry, jax.tree.map(lambda x, part: _put(x, at_SC, part), outputs, new)

    _, shapes = jax.eval_shape(
        lambda: body(carry, jax.tree.map(lambda x: _take(x, places(0)), tokens))
    )
    outputs = jax.tree.map(lambda x: jnp.zeros((S, M, *x.shape[2:]), x.dtype), shapes)
    carry, outputs = jax.lax.fori_loop(0, count, one_chunk, (carry, outputs))
    return carry, jax.tree.map(lambda x: x.reshape(B, N, *x.shape[2:]), outputs)


def _valid_first(mask_SM: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Places of the tokens to compute, then M ("none"), and the number of chunks that hold one."""
    M = mask_SM.shape[1]
    order_SM = jnp.argsort(~mask_SM, axis=1, stable=True).astype(jnp.int32)
    number_S1 = jnp.sum(mask_SM, axis=1, keepdims=True, dtype=jnp.int32)
    order_SM = jnp.where(jnp.arange(M)[None, :] < number_S1, order_SM, M)
    filled = jnp.pad(order_SM, ((0, 0), (0, -M % size)), constant_values=M)
    return filled, (jnp.max(number_S1) + size - 1) // size


def _take(x_SM: jax.Array, at_SC: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))(x_SM, at_SC)


def _put(x_SM: jax.Array, at_SC: jax.Array, new: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, at, part: x.at[at].set(part, mode="drop"))(x_SM, at_SC, new)
