"""Attention of global and of local layers, to new tokens, to a cache and to a shared prefix.

Shape letters as in `gkdjax.models.layers`; W is the window of local layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.kv_cache import Cache, Prefix
from gkdjax.models.layers import rotate, rotation

# Added to a forbidden score. Finite, so that a row with nothing to see (padding) gives no NaN.
_FORBIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


class KeyValues(NamedTuple):
    """Keys and values to attend to, and which query may see which of them."""

    k: jax.Array  # [B,S,G,C], or [S,G,C] if all rows share them
    v: jax.Array
    visible_BTS: jax.Array  # bool, an axis of length 1 stands for any


def attend(q_BTHC: jax.Array, sources: list[KeyValues], scale: float) -> jax.Array:
    """Grouped-query attention with one softmax over the keys of all sources -> [B,T,H*C].

    The sources' scores are joined, not their keys: a cache is read where it lies, and a prefix that
    all rows share is not copied to each. Scores and softmax are float32. A query that sees nothing
    gets a finite, meaningless mean.
    """
    B, T, H, C = q_BTHC.shape
    G = sources[0].k.shape[-2]
    q_BTGRC = q_BTHC.reshape(B, T, G, H // G, C)
    scores = []
    for source in sources:
        keys = "BSGC" if source.k.ndim == 4 else "SGC"
        scores_BGRTS = jnp.einsum(
            f"BTGRC,{keys}->BGRTS", q_BTGRC, source.k, preferred_element_type=jnp.float32
        )
        visible = source.visible_BTS[:, None, None, :, :]
        scores.append(jnp.where(visible, scores_BGRTS * scale, _FORBIDDEN))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    out_BTGRC = jnp.zeros((), jnp.float32)
    start = 0
    for source in sources:
        values, stop = ("BSGC" if source.v.ndim == 4 else "SGC"), start + source.k.shape[-3]
        part = weights[..., start:stop].astype(source.v.dtype)
        out_BTGRC = out_BTGRC + jnp.einsum(
            f"BGRTS,{values}->BTGRC", part, source.v, preferred_element_type=jnp.float32
        )
        start = stop
    return out_BTGRC.astype(q_BTHC.dtype).reshape(B, T, H * C)


def attention_of(
    spec: DecoderConfig,
    mask_BT: jax.Array,
    positions_BT: jax.Array,
    cache: Cache | None,
    prefix: Prefix | None,
) -> Callable:
    """-> attention(is_global, index, q, k, v) -> (out [B,T,H*C], rotated k [B,T,G,C]).

    `index` says the how-manyth of its kind the layer is. What depends on positions alone (angles,
    masks) is made here, once for all layers.
    """

    def branch(rope, window, cached, shared):
        angles = rotation(positions_BT, rope, spec.head_dim)
        # Two blocks are the least that a query sees parts of.
        banded = window is not None and cached is None and positions_BT.shape[1] > 2 * window
        of_new = _banded(window, positions_BT, mask_BT) if banded else _plain(positions_BT, mask_BT)
        query_BT = of_new.query_BT
        visible_new = _visible(query_BT, of_new.key_BS, of_new.key_mask_BS, window)
        if cached is not None:
            visible_old = _visible(query_BT, cached.positions_BS, cached.mask_BS, window)
        if shared is not None:
            visible_shared = _visible(
                query_BT, shared.positions_S[None], shared.mask_S[None], window
            )

        def attention(index, q, k, v):
            q, k = rotate(q, angles), rotate(k, angles)
            sources = []
            if shared is not None:
                kv = _layer(index, shared.k_LSGC, shared.v_LSGC)
                sources.append(KeyValues(*kv, visible_shared))
            if cached is not None:
                kv = _layer(index, cached.k_LBSGC, cached.v_LBSGC)
                sources.append(KeyValues(*kv, visible_old))
            sources.append(KeyValues(of_new.keys(k), of_new.keys(v), visible_new))
            out = attend(of_new.queries(q), sources, spec.query_scale)
            return of_new.undo(out), k

        return attention

    def of_kind(source, kind):
        return None if source is None else getattr(source, kind)

    global_branch = branch(
        spec.rope_global, None, of_kind(cache, "global_layers"), of_kind(prefix, "global_layers")
    )
    if all(spec.is_global_L):
        return lambda is_global, *args: global_branch(*args)
    local_branch = branch(
        spec.rope_local,
        spec.window,
        of_kind(cache, "local_layers"),
        of_kind(prefix, "local_layers"),
    )
    if not any(spec.is_global_L):
        return lambda is_global, *args: local_branch(*args)
    return lambda is_global, *args: jax.lax.cond(is_global, global_branch, local_branch, *args)


class _Arrangement(NamedTuple):
    """How the new tokens stand when they attend to each other."""

    query_BT: jax.Array  # positions
    key_BS: jax.Array
    key_mask_BS: jax.Array
    queries: Callable  # [B,T,H,C] -> as query_BT stands
    keys: Callable  # [B,T,G,C] -> as key_BS stands
    undo: Callable  # the queries' outputs -> [B,T,...]


def _plain(positions_BT, mask_BT) -> _Arrangement:
    """Every query beside every key."""

    def same(x):
        return x

    return _Arrangement(positions_BT, positions_BT, mask_BT, same, same, same)


def _banded(window: int, positions_BT, mask_BT) -> _Arrangement:
    """Blocks of W queries beside the keys of their own block and of the one before.

    They hold all that a query may see: the columns of a row are no farther apart than their
    positions. Each block becomes a row of its own.
    """
    B, T = mask_BT.shape
    num_blocks = -(-T // window)
    filler = num_blocks * window - T

    def blocks(x):
        x = jnp.pad(x, ((0, 0), (0, filler), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(B, num_blocks, window, *x.shape[2:])

    def as_rows(x):
        return x.reshape(B * num_blocks, *x.shape[2:])

    def queries(x):
        return as_rows(blocks(x))

    def keys(x):
        own = blocks(x)
        before = jnp.concatenate([jnp.zeros_like(own[:, :1]), own[:, :-1]], axis=1)
        return as_rows(jnp.concatenate([before, own], axis=2))

    def undo(x):
        return x.reshape(B, num_blocks * window, *x.shape[2:])[:, :T]

    return _Arrangement(
        queries(positions_BT), keys(positions_BT), keys(mask_BT), queries, keys, undo
    )


def _layer(index, *stacks):
    """One layer's part of each stack, read where it lies."""
    return [jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False) for stack in stacks]


def _visible(query_BT, key_BS, key_mask_BS, window: int | None) -> jax.Array:
    """bool [B,T,S]: causal, real keys only, and within the window where there is one.

    One row of keys 0..4, all real, window 2: the query at 3 sees 0 0 1 1 0.
    A query equal in position to a padded key does not see it: the mask says so.
    """
    distance_BTS = query_BT[:, :, None] - key_BS[:, None, :]
    visible_BTS = (distance_BTS >= 0) & key_mask_BS[:, None, :]
    return visible_BTS if window is None else visible_BTS & (distance_BTS < window)
