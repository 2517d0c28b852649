"""Tokens a chunk at a time, those that count first, so that no [tokens, vocabulary] array exists.

Shape letters: B rows, N tokens of a row, M = B N tokens of one device, C tokens of a chunk.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from gkdjax.losses.sharded_vocab import ShardedVocab


class Chunks(NamedTuple):
    """How tokens are cut; hashable."""

    size: int  # tokens that a device computes at once; fewer if it has not so many
    mesh: Mesh | None  # None: one device has them all
    row_axes: tuple[str, ...] = ()  # of the mesh: they share the rows B
    vocab_axis: str | None = None  # of the mesh: it shares the vocabulary; None: nothing does

    @classmethod
    def of_memory(
        cls,
        chunk_size: int,
        arrays: int,
        mesh: Mesh | None,
        row_axes: Sequence[str] | None,
        vocab_axis: str | None,
    ) -> "Chunks":
        """So many tokens that `arrays` arrays [tokens, V] are as large as one of [chunk_size, V].

        Args:
          mesh, row_axes, vocab_axis: as in `losses.fused_topk_divergence`.

        Raises:
          ValueError: chunk_size is not a whole number of at least 1.
        """
        if not isinstance(chunk_size, numbers.Integral) or chunk_size < 1:
            raise ValueError(f"chunk_size must be a whole number of at least 1, got {chunk_size!r}")
        size = max(chunk_size // arrays, 1)
        if mesh is None or mesh.size == 1:
            return cls(size, None)
        rows = tuple(row_axes) if row_axes is not None else mesh.axis_names[:1]
        cut = vocab_axis is not None and mesh.shape[vocab_axis] > 1
        return cls(size, mesh, rows, vocab_axis if cut else None)

    @property
    def vocabulary(self) -> ShardedVocab:
        """As `body` sees it."""
        return ShardedVocab(self.vocab_axis)


def over_chunks(
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    total: Any,
    tokens: Any,
    shared: Any,
    mask_BN: jax.Array,
    chunks: Chunks,
    finish: Callable[[Any], Any] = lambda outputs: outputs,
) -> tuple[Any, Any]:
    """Runs `body` over chunks of the tokens that the mask keeps; the others cost nothing.

        mask 1 0 1 1 0 1, size 2  ->  tokens (0, 2), then (3, 5)

    As many chunks are computed as hold a token, a number known only when it runs, so reverse-mode
    differentiation cannot pass through: gradients are made in `body`. Each device puts its own
    rows in order and computes them by itself: no token leaves it. Devices that share the vocabulary
    have the same rows, and so run in step; `body` asks through `chunks.vocabulary`.

    Args:
      body: (total, chunk, shared) -> (total, outputs); `chunk` is `tokens` with leaves [C,...], all
        zero for what fills up the last one, and the outputs' leaves are [C,...].
      total: a pytree of `jax.ShapeDtypeStruct`; what is added up begins at zero. Along its leaves'
        first axis lies the vocabulary, whole.
      tokens: a pytree of leaves [B,N,...].
      shared: a pytree that all tokens need, with leaves [V,...], as an unembedding.
      mask_BN: bool.
      chunks: how to cut.
      finish: what each device does to its outputs [B,N,...], once, after its last chunk.

    Returns:
      (total, added up over all devices; outputs with leaves [B,N,...], zero where the mask is
      False).

    Raises:
      ValueError: rows, or a vocabulary, that the mesh's axes do not divide.
    """

    def compute(tokens, shared, mask_BN, parts=1):
        part = total if parts == 1 else jax.tree.map(lambda x: _part(x, parts), total)
        added, outputs = _on_one_device(body, part, tokens, shared, mask_BN, chunks.size)
        return added, finish(outputs)

    mesh = chunks.mesh
    if mesh is None:
        return compute(tokens, shared, mask_BN)
    shares = math.prod(mesh.shape[axis] for axis in chunks.row_axes)
    parts = 1 if chunks.vocab_axis is None else mesh.shape[chunks.vocab_axis]
    _check_divides("rows", mask_BN.shape[0], shares, *chunks.row_axes)
    for leaf in jax.tree.leaves(shared) if parts > 1 else ():
        _check_divides("tokens of the vocabulary", leaf.shape[0], parts, chunks.vocab_axis)

    others = tuple(axis for axis in chunks.row_axes if mesh.shape[axis] > 1)

    def compute_and_add(*arguments):
        added, outputs = compute(*arguments, parts)
        return jax.lax.psum(added, others) if others else added, outputs

    rows = PartitionSpec(chunks.row_axes)
    vocabulary = PartitionSpec(*([chunks.vocab_axis] if parts > 1 else []))
    return jax.shard_map(
        compute_and_add,
        mesh=mesh,
        in_specs=(rows, vocabulary, rows),
        out_specs=(vocabulary, rows),
        check_vma=False,
    )(tokens, shared, mask_BN)


def _part(x: jax.ShapeDtypeStruct, parts: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype)


def _check_divides(what: str, number: int, parts: int, *axes: str) -> None:
    if number % parts:
        told = " x ".join(map(repr, axes))
        raise ValueError(f"{number} {what} cannot be shared by {parts} devices of {told}")


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
