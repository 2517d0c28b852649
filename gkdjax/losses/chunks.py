"""Tokens a chunk at a time, those that count first, so that no [tokens, vocabulary] array exists.

Shape letters: B rows, N tokens of a row, M = B N tokens of one device, C tokens of a chunk.
"""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec


class Chunks(NamedTuple):
    """How tokens are cut; hashable."""

    size: int  # tokens that a device computes at once; fewer if it has not so many
    mesh: Mesh | None  # its first axis shares the rows B; None: one device has them all

    @classmethod
    def of_memory(cls, chunk_size: int, arrays: int, mesh: Mesh | None) -> "Chunks":
        """So many tokens that `arrays` arrays [tokens, V] are as large as one of [chunk_size, V].

        Raises:
          ValueError: chunk_size is not a whole number of at least 1.
        """
        if not isinstance(chunk_size, numbers.Integral) or chunk_size < 1:
            raise ValueError(f"chunk_size must be a whole number of at least 1, got {chunk_size!r}")
        return cls(max(chunk_size // arrays, 1), mesh)


def over_chunks(
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    total: Any,
    tokens: Any,
    shared: Any,
    mask_BN: jax.Array,
    chunks: Chunks,
) -> tuple[Any, Any]:
    """Runs `body` over chunks of the tokens that the mask keeps; the others cost nothing.

        mask 1 0 1 1 0 1, size 2  ->  tokens (0, 2), then (3, 5)

    As many chunks are computed as hold a token, a number known only when it runs, so reverse-mode
    differentiation cannot pass through: gradients are made in `body`. Each device puts its own
    rows in order and computes them by itself: no token, and no logit, leaves it.

    Args:
      body: (total, chunk, shared) -> (total, outputs); `chunk` is `tokens` with leaves [C,...], all
        zero for what fills up the last one, and the outputs' leaves are [C,...].
      total: a pytree of `jax.ShapeDtypeStruct`; what is added up begins at zero.
      tokens: a pytree of leaves [B,N,...].
      shared: a pytree that all tokens need, as an unembedding.
      mask_BN: bool.
      chunks: how to cut.

    Returns:
      (total, added up over all devices; outputs with leaves [B,N,...], zero where the mask is
      False).

    Raises:
      ValueError: rows that the mesh's first axis does not divide.
    """

    def compute(tokens, shared, mask_BN):
        return _on_one_device(body, total, tokens, shared, mask_BN, chunks.size)

    mesh = chunks.mesh
    if mesh is None or mesh.size == 1:
        return compute(tokens, shared, mask_BN)
    axis = mesh.axis_names[0]
    if mask_BN.shape[0] % mesh.shape[axis]:
        raise ValueError(
            f"{mask_BN.shape[0]} rows cannot be shared by {mesh.shape[axis]} devices of {axis!r}"
        )

    def compute_and_add(*arguments):
        added, outputs = compute(*arguments)
        return jax.lax.psum(added, axis), outputs

    rows, whole = PartitionSpec(axis), PartitionSpec()
    return jax.shard_map(
        compute_and_add,
        mesh=mesh,
        in_specs=(rows, whole, rows),
        out_specs=(whole, rows),
        check_vma=False,
    )(tokens, shared, mask_BN)


def _on_one_device(body, total, tokens, shared, mask_BN, size: int):
    B, N = mask_BN.shape
    size = min(size, B * N)
    tokens = jax.tree.map(lambda x: jnp.reshape(x, (B * N, *x.shape[2:])), tokens)
    order_M, count = _kept_first(mask_BN.reshape(B * N), size)
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), total)

    def take(i):
        at_C = jax.lax.dynamic_slice_in_dim(order_M, i * size, size)
        return at_C, jax.tree.map(
            lambda x: jnp.take(x, at_C, axis=0, mode="fill", fill_value=0), tokens
        )

    def one_chunk(i, state):
        total, outputs = state
        at_C, chunk = take(i)
        total, new = body(total, chunk, shared)
        outputs = jax.tree.map(lambda x, part: x.at[at_C].set(part, mode="drop"), outputs, new)
        return total, outputs

    _, shapes = jax.eval_shape(lambda: body(total, take(0)[1], shared))
    outputs = jax.tree.map(lambda x: jnp.zeros((B * N, *x.shape[1:]), x.dtype), shapes)
    total, outputs = jax.lax.fori_loop(0, count, one_chunk, (total, outputs))
    return total, jax.tree.map(lambda x: x.reshape(B, N, *x.shape[1:]), outputs)


def _kept_first(mask_M: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Places of the tokens to compute, then M ("none"), and the number of chunks that hold one."""
    M = mask_M.shape[0]
    kept = jnp.sum(mask_M, dtype=jnp.int32)
    order_M = jnp.argsort(~mask_M, stable=True).astype(jnp.int32)
    order_M = jnp.where(jnp.arange(M) < kept, order_M, M)
    return jnp.pad(order_M, (0, -M % size), constant_values=M), (kept + size - 1) // size
