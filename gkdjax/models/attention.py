"""Attention of global and local layers to new tokens, to a cache and to a shared prefix.

Shape letters as in `gkdjax.models.layers`; W is the window of local layers.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gkdjax.models.decoder_config import DecoderConfig, RopeSpec
from gkdjax.models.kv_cache import Cache, Stack
from gkdjax.models.layers import rotate, rotation

# A forbidden score. Finite, so that a row that sees nothing (padding) gives no NaN.
_FORBIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def attend(q_BTHC: jax.Array, sources: Sequence[tuple], scale: float) -> jax.Array:
    """Grouped-query attention with one softmax over the keys of all sources -> [B,T,H*C].

    The scores of the sources are joined, not their keys: a cache is read where it lies, and a
    prefix that all rows share is not copied. Scores and softmax are float32.

    A source is (keys, values, visible): [B,S,G,C] twice, or [S,G,C] if all rows share them, and
    bool [B,T,S], in which an axis of length 1 stands for any. A query that sees no key gets a
    finite, meaningless mean.
    """
    B, T, H, C = q_BTHC.shape
    G = sources[0][0].shape[-2]
    q_BTGRC = q_BTHC.reshape(B, T, G, H // G, C)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    letters = ["BSGC" if k.ndim == 4 else "SGC" for k, _, _ in sources]
    scores = []
    for kv, (k, _, visible_BTS) in zip(letters, sources, strict=True):
        scores_BGRTS = product(f"BTGRC,{kv}->BGRTS", q_BTGRC, k) * scale
        scores.append(jnp.where(visible_BTS[:, None, None, :, :], scores_BGRTS, _FORBIDDEN))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    out_BTGRC = jnp.zeros((), jnp.float32)
    start = 0
    for kv, (_, v, _) in zip(letters, sources, strict=True):
        stop = start + v.shape[-3]
        part = weights[..., start:stop].astype(v.dtype)
        out_BTGRC = out_BTGRC + product(f"BGRTS,{kv}->BTGRC", part, v)
        start = stop
    return out_BTGRC.astype(q_BTHC.dtype).reshape(B, T, H * C)


def attention_of(
    spec: DecoderConfig,
    mask_BT: jax.Array,
    positions_BT: jax.Array,
    cache: Cache | None,
    prefix: Cache | None,
) -> Callable:
    """-> attention(is_global, index, q, k, v) -> (out [B,T,H*C], rotated k [B,T,G,C]).

    `index` is the layer's number among those of its kind; `prefix` has one row. Whatever depends
    on positions alone (angles, masks) is computed here, once for all layers.
    """
    B, T = mask_BT.shape

    def branch(kind: str, rope: RopeSpec, window: int | None):
        angles = rotation(positions_BT, rope, spec.head_dim)
        # Rows of up to two blocks are cheaper as they are.
        banded = window is not None and cache is None and 2 * window < T
        queries = functools.partial(_blocks, window=window) if banded else lambda x: x
        keys = functools.partial(queries, with_previous=True) if banded else queries
        query_BT = queries(positions_BT)
        visible_new = _visible(query_BT, keys(positions_BT), keys(mask_BT), window)
        stored = [getattr(source, kind) for source in (prefix, cache) if source is not None]
        seen = [_visible(query_BT, stack.positions, stack.mask, window) for stack in stored]

        def attention(index, q, k, v):
            q, k = rotate(q, angles), rotate(k, angles)
            sources = [
                (*_layer(stack, index), visible)
                for stack, visible in zip(stored, seen, strict=True)
            ]
            if prefix is not None:
                k_1SGC, v_1SGC, visible = sources[0]
                sources[0] = k_1SGC[0], v_1SGC[0], visible
            sources.append((keys(k), keys(v), visible_new))
            out = attend(queries(q), sources, spec.query_scale)
            return out.reshape(B, -1, out.shape[-1])[:, :T] if banded else out, k

        return attention

    kinds = {
        True: ("global_layers", spec.rope_global, None),
        False: ("local_layers", spec.rope_local, spec.window),
    }
    branches = [branch(*kinds[is_global]) for is_global in sorted({*spec.is_global_L})[::-1]]
    if len(branches) == 1:
        return lambda is_global, *args: branches[0](*args)
    return lambda is_global, *args: jax.lax.cond(is_global, *branches, *args)


def _blocks(x: jax.Array, window: int, with_previous: bool = False) -> jax.Array:
    """[B,T,...] -> [B * blocks,W,...], or 2W with each block's predecessor in front of it.

    A query needs the keys of its own block and of the one before, and no others: columns of a row
    are no farther apart than their positions.
    """
    B, T = x.shape[:2]
    num_blocks = -(-T // window)
    x = jnp.pad(x, ((0, 0), (0, num_blocks * window - T), *((0, 0),) * (x.ndim - 2)))
    x = x.reshape(B, num_blocks, window, *x.shape[2:])
    if with_previous:
        previous = jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
        x = jnp.concatenate([previous, x], axis=2)
    return x.reshape(B * num_blocks, *x.shape[2:])


def _layer(stack: Stack, index: jax.Array) -> list[jax.Array]:
    """Keys and values of one layer, read where they lie."""
    return [jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False) for x in (stack.k, stack.v)]


def _visible(query_BT, key_BS, key_mask_BS, window: int | None) -> jax.Array:
    """bool [B,T,S]: causal, real keys only, and within the window if there is one.

    One row of keys 0..4, all real, window 2: the query at 3 sees 0 0 1 1 0.
    Padding may have a query's own position: the mask hides it.
    """
    distance_BTS = query_BT[:, :, None] - key_BS[:, None, :]
    visible_BTS = (distance_BTS >= 0) & key_mask_BS[:, None, :]
    return visible_BTS if window is None else visible_BTS & (distance_BTS < window)
