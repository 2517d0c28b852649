"""Keys and values that outlive a call: of rows being written, and of a prefix that rows share.

Global and local layers have stacks of their own lengths. Shape letters as in
`gkdjax.models.layers`, and L layers of one kind.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gkdjax.models.decoder_config import DecoderConfig


class Stack(NamedTuple):
    """Keys and values of all layers of one kind, in slots that the rows share."""

    k_LBSGC: jax.Array  # compute dtype
    v_LBSGC: jax.Array  # compute dtype
    positions_BS: jax.Array  # int32, position within the row, the prefix counted
    mask_BS: jax.Array  # bool, the slot holds a real token


class Cache(NamedTuple):
    """What the rows have read so far.

    Rows of different lengths are padded on the left, so that the next slot is the same for all.
    The slots of local layers are a ring as long as the window: a new token takes the place of one
    that no later token sees.
    """

    global_layers: Stack | None
    local_layers: Stack | None
    columns: jax.Array  # int32 scalar, tokens of each row so far, padding included
    real_B: jax.Array  # int32, those that are no padding


class PrefixStack(NamedTuple):
    """One batch row's keys and values of all layers of one kind."""

    k_LSGC: jax.Array
    v_LSGC: jax.Array
    positions_S: jax.Array  # int32
    mask_S: jax.Array  # bool


class Prefix(NamedTuple):
    """What all rows begin with, read once; local layers keep as many tokens of it as a window."""

    global_layers: PrefixStack | None
    local_layers: PrefixStack | None
    length: jax.Array  # int32 scalar, its real tokens


def init_cache(spec: DecoderConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache for `batch` rows of at most `slots` tokens, padding included."""

    def stack(layers, length):
        shape = (layers, batch, length, spec.num_kv_heads, spec.head_dim)
        return Stack(
            k_LBSGC=jnp.zeros(shape, dtype),
            v_LBSGC=jnp.zeros(shape, dtype),
            positions_BS=jnp.zeros((batch, length), jnp.int32),
            mask_BS=jnp.zeros((batch, length), bool),
        )

    num_global = sum(spec.is_global_L)
    num_local = spec.num_layers - num_global
    return Cache(
        global_layers=stack(num_global, slots) if num_global else None,
        local_layers=stack(num_local, min(slots, spec.window)) if num_local else None,
        columns=jnp.zeros((), jnp.int32),
        real_B=jnp.zeros((batch,), jnp.int32),
    )


def index_in_stack(spec: DecoderConfig) -> jax.Array:
    """int32 [all layers]: the how-manyth of its kind each layer is."""
    is_global = np.asarray(spec.is_global_L)
    return jnp.asarray(np.where(is_global, np.cumsum(is_global), np.cumsum(~is_global)) - 1)


def write(spec: DecoderConfig, cache: Cache, k_new, v_new, positions_BT, mask_BT) -> Cache:
    """The cache after T more tokens of each row, k_new and v_new being [all layers,B,T,G,C]."""
    T = mask_BT.shape[1]
    chosen = np.asarray(spec.is_global_L)

    def written(stack, layers, put):
        return Stack(
            put(stack.k_LBSGC, k_new[layers], 2),
            put(stack.v_LBSGC, v_new[layers], 2),
            put(stack.positions_BS, positions_BT, 1),
            put(stack.mask_BS, mask_BT, 1),
        )

    def append(old, new, axis):
        return jax.lax.dynamic_update_slice_in_dim(old, new, cache.columns, axis)

    def put_in_ring(old, new, axis):
        return _put_in_ring(old, new, cache.columns, axis)

    global_layers, local_layers = cache.global_layers, cache.local_layers
    if global_layers is not None:
        global_layers = written(global_layers, np.flatnonzero(chosen), append)
    if local_layers is not None:
        local_layers = written(local_layers, np.flatnonzero(~chosen), put_in_ring)
    real_B = cache.real_B + jnp.sum(mask_BT, axis=1, dtype=jnp.int32)
    return Cache(global_layers, local_layers, cache.columns + T, real_B)


def _put_in_ring(old, new, columns, axis: int):
    """Column c goes to slot c modulo the ring's length; of more columns than slots, the last."""
    slots, T = old.shape[axis], new.shape[axis]
    if T == 1:
        return jax.lax.dynamic_update_slice_in_dim(old, new, columns % slots, axis)
    if slots <= T:
        last = jax.lax.slice_in_dim(new, T - slots, T, axis=axis)
        return jnp.roll(last, columns + T, axis)
    at = (slice(None),) * axis + ((columns + jnp.arange(T)) % slots,)
    return old.at[at].set(new, unique_indices=True)


def prefix_of(cache: Cache) -> Prefix:
    """What a cache of one row holds, for all rows to share."""

    def shared(stack):
        if stack is None:
            return None
        k_LSGC, v_LSGC = stack.k_LBSGC[:, 0], stack.v_LBSGC[:, 0]
        return PrefixStack(k_LSGC, v_LSGC, stack.positions_BS[0], stack.mask_BS[0])

    return Prefix(shared(cache.global_layers), shared(cache.local_layers), cache.real_B[0])
