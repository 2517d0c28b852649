"""Computes tokens a chunk at a time, and skips those that do not count.

No [tokens, vocabulary] array exists then. Letters: B rows, N tokens of a row, M = B N tokens of one
device, C tokens of a chunk.
"""

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from gkdjax.losses.sharded_vocab import ShardedVocab


class Chunks(NamedTuple):
    """How tokens are divided; hashable."""

    size: int  # tokens that a device computes at once, at most
    mesh: Mesh | None  # None: one device has all tokens
    row_axes: tuple[str, ...] = ()  # mesh axes that shard the rows B
    vocab_axis: str | None = None  # mesh axis that shards the vocabulary; None: it is replicated

    @classmethod
    def of_memory(
        cls,
        chunk_size: int,
        arrays: int,
        mesh: Mesh | None = None,
        row_axes: Sequence[str] | None = None,
        vocab_axis: str | None = None,
    ) -> "Chunks":
        """Takes so many tokens that `arrays` arrays [tokens, V] are one of [chunk_size, V].

        Args:
          mesh: devices that share the work. None: no others.
          row_axes: mesh axes that shard the rows B; each device divides its own rows into chunks.
            None: the first axis.
          vocab_axis: the mesh axis that shards the unembedding's V: each device has the logits of
            its own tokens, and the devices exchange a few numbers a token. None: V is replicated.

        Raises:
          ValueError: chunk_size is not a whole number of at least 1.
        """
        if not isinstance(chunk_size, numbers.Integral) or chunk_size < 1:
            raise ValueError(f"chunk_size must be a whole number of at least 1, got {chunk_size!r}")
        size = max(chunk_size // arrays, 1)
        if mesh is None or mesh.size == 1:
            return cls(size, None)
        rows = tuple(row_axes) if row_axes is not None else mesh.axis_names[:1]
        sharded = vocab_axis is not None and mesh.shape[vocab_axis] > 1
        return cls(size, mesh, rows, vocab_axis if sharded else None)

    @property
    def vocabulary(self) -> ShardedVocab:
        return ShardedVocab(self.vocab_axis)


def over_chunks(
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    total: Any,
    tokens: Any,
    shared: Any,
    mask_BN: Array,
    chunks: Chunks,
    finish: Callable[[Any], Any] = lambda outputs: outputs,
) -> tuple[Any, Any]:
    """Runs `body` over chunks of the tokens in the mask.

        mask 1 0 1 1 0 1, size 2  ->  tokens (0, 2), then (3, 5)

    The number of chunks is known only when it runs, so reverse-mode differentiation cannot pass
    through: gradients are made in `body`. Each device orders and computes its own rows, no token is
    moved. Devices that shard the vocabulary have the same rows and run in step; `body` combines
    their parts with `chunks.vocabulary`.

    Args:
      body: (total, chunk, shared) -> (total, outputs). `chunk` is `tokens` with leaves [C,...],
        zero where the last chunk has no token; the outputs' leaves are [C,...].
      total: a pytree of `jax.ShapeDtypeStruct`, of sums that begin at zero. The first axis of its
        leaves is the whole vocabulary, if that is sharded.
      tokens: a pytree of leaves [B,N,...].
      shared: a pytree of leaves [V,...] that all tokens need.
      mask_BN: bool.
      finish: applied on each device to its outputs [B,N,...], after the last chunk.

    Returns:
      (total, summed over all devices; outputs with leaves [B,N,...], zero outside the mask).

    Raises:
      ValueError: rows, or a vocabulary, that the mesh's axes do not divide.
    """
    mesh, axis = chunks.mesh, chunks.vocab_axis
    parts = 1 if axis is None else mesh.shape[axis]
    other_rows = tuple(name for name in chunks.row_axes if mesh.shape[name] > 1)

    def compute(tokens, shared, mask_BN):
        def zeros(x):
            shape = x.shape if parts == 1 else (x.shape[0] // parts, *x.shape[1:])
            return jnp.zeros(shape, x.dtype)

        added, outputs = _on_one_device(
            body, jax.tree.map(zeros, total), tokens, shared, mask_BN, chunks.size
        )
        outputs = finish(outputs)
        return jax.lax.psum(added, other_rows) if other_rows else added, outputs

    if mesh is None:
        return compute(tokens, shared, mask_BN)
    shares = math.prod(mesh.shape[name] for name in chunks.row_axes)
    _check_divides("rows", mask_BN.shape[0], shares, *chunks.row_axes)
    for leaf in jax.tree.leaves(shared) if parts > 1 else ():
        _check_divides("tokens of the vocabulary", leaf.shape[0], parts, axis)
    rows = PartitionSpec(chunks.row_axes)
    vocabulary = PartitionSpec(*([axis] if parts > 1 else []))
    return jax.shard_map(
        compute,
        mesh=mesh,
        in_specs=(rows, vocabulary, rows),
        out_specs=(vocabulary, rows),
        check_vma=False,
    )(tokens, shared, mask_BN)


def _check_divides(what: str, number: int, parts: int, *axes: str) -> None:
    if number % parts:
        named = " x ".join(map(repr, axes))
        raise ValueError(f"{number} {what} cannot be shared by {parts} devices of {named}")


def _on_one_device(body, total, tokens, shared, mask_BN, size: int):
    B, N = mask_BN.shape
    M = B * N
    size = min(size, M)
    tokens = jax.tree.map(lambda x: jnp.reshape(x, (M, *x.shape[2:])), tokens)
    # The places of the tokens in the mask, in their order; then M, which is out of range.
    mask_M = mask_BN.reshape(M)
    count = jnp.sum(mask_M, dtype=jnp.int32)
    order_M = jnp.argsort(~mask_M, stable=True).astype(jnp.int32)
    order_M = jnp.where(jnp.arange(M) < count, order_M, M)
    order_M = jnp.pad(order_M, (0, -M % size), constant_values=M)

    def take(i):
        at_C = jax.lax.dynamic_slice_in_dim(order_M, i * size, size)
        filled = functools.partial(jnp.take, indices=at_C, axis=0, mode="fill", fill_value=0)
        return at_C, jax.tree.map(filled, tokens)

    def one_chunk(i, state):
        total, outputs = state
        at_C, chunk = take(i)
        total, new = body(total, chunk, shared)
        outputs = jax.tree.map(lambda x, part: x.at[at_C].set(part, mode="drop"), outputs, new)
        return total, outputs

    _, shapes = jax.eval_shape(lambda: body(total, take(0)[1], shared))
    outputs = jax.tree.map(lambda x: jnp.zeros((M, *x.shape[1:]), x.dtype), shapes)
    chunks = (count + size - 1) // size
    total, outputs = jax.lax.fori_loop(0, chunks, one_chunk, (total, outputs))
    return total, jax.tree.map(lambda x: x.reshape(B, N, *x.shape[1:]), outputs)
