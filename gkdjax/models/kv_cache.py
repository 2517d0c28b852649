"""Keys and values that outlive a call.

Global and local layers have a stack each, of different lengths. Shape letters as in
`gkdjax.models.layers`, and L layers of one kind.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gkdjax.models.decoder_config import DecoderConfig


class Stack(NamedTuple):
    """Keys and values of all layers of one kind."""

    k: jax.Array  # [L,B,S,G,C], compute dtype
    v: jax.Array  # [L,B,S,G,C], compute dtype
    positions: jax.Array  # int32 [B,S], position within the row, the prefix counted
    mask: jax.Array  # bool [B,S], the slot holds a real token


class Cache(NamedTuple):
    """Everything that the rows have read so far, or, of one row, the prefix that all rows share.

    Rows of different lengths are padded on the left, so that the next slot is the same for all.
    The slots of local layers are a ring as long as the window: a new token replaces one that no
    later token sees.
    """

    global_layers: Stack | None
    local_layers: Stack | None
    columns: jax.Array  # int32 scalar, tokens of each row so far, padding included
    real_B: jax.Array  # int32, those that are no padding


def init_cache(spec: DecoderConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache for `batch` rows of at most `slots` tokens, padding included."""

    def stack(layers: int, length: int) -> Stack:
        shape = (layers, batch, length, spec.num_kv_heads, spec.head_dim)
        return Stack(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            positions=jnp.zeros((batch, length), jnp.int32),
            mask=jnp.zeros((batch, length), bool),
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
    """int32 [all layers]: each layer's number among the layers of its kind."""
    is_global = np.asarray(spec.is_global_L)
    return jnp.asarray(np.where(is_global, np.cumsum(is_global), np.cumsum(~is_global)) - 1)


def write(spec: DecoderConfig, cache: Cache, k_new, v_new, positions_BT, mask_BT) -> Cache:
    """The cache after T more tokens of each row; k_new and v_new are [all layers,B,T,G,C]."""
    is_global = np.asarray(spec.is_global_L)

    def written(stack: Stack | None, layers: np.ndarray, put) -> Stack | None:
        if stack is None:
            return None
        return Stack(
            put(stack.k, k_new[layers], cache.columns, 2),
            put(stack.v, v_new[layers], cache.columns, 2),
            put(stack.positions, positions_BT, cache.columns, 1),
            put(stack.mask, mask_BT, cache.columns, 1),
        )

    return Cache(
        written(cache.global_layers, *np.nonzero(is_global), jax.lax.dynamic_update_slice_in_dim),
        written(cache.local_layers, *np.nonzero(~is_global), _put_in_ring),
        cache.columns + mask_BT.shape[1],
        cache.real_B + jnp.sum(mask_BT, axis=1, dtype=jnp.int32),
    )


def _put_in_ring(old: jax.Array, new: jax.Array, columns: jax.Array, axis: int) -> jax.Array:
    """Column c goes to slot c modulo the ring's length; of more columns than slots, the last."""
    slots, T = old.shape[axis], new.shape[axis]
    if T == 1:
        return jax.lax.dynamic_update_slice_in_dim(old, new, columns % slots, axis)
    if slots <= T:
        last = jax.lax.slice_in_dim(new, T - slots, T, axis=axis)
        return jnp.roll(last, columns + T, axis)
    at = (slice(None),) * axis + ((columns + jnp.arange(T)) % slots,)
    return old.at[at].set(new, unique_indices=True)
