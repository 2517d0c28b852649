"""The one decoder of all families: linen declares the parameters, plain functions compute.

Shape letters as in `gkdjax.models.layers`, and L layers, V vocabulary.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gkdjax.losses.head import unembed
from gkdjax.models.layers import KeyValues, attend, dense, gated_mlp, rms_norm, rotate, rotation
from gkdjax.models.spec import DecoderSpec, layer_shapes

_KERNEL_INIT = nn.initializers.normal(0.02)


class Cache(NamedTuple):
    """Keys and values of the positions read so far, in slots that all rows share.

    Rows of different lengths are padded on the left, so that the next slot is the same for all.
    """

    k_LBSGC: jax.Array  # compute dtype
    v_LBSGC: jax.Array  # compute dtype
    positions_BS: jax.Array  # int32, position within the row
    mask_BS: jax.Array  # bool, the slot holds a real token
    next_slot: jax.Array  # int32 scalar


def init_cache(spec: DecoderSpec, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache for `batch` rows of at most `slots` tokens, padding included."""
    shape = (spec.num_layers, batch, slots, spec.num_kv_heads, spec.head_dim)
    return Cache(
        k_LBSGC=jnp.zeros(shape, dtype),
        v_LBSGC=jnp.zeros(shape, dtype),
        positions_BS=jnp.zeros((batch, slots), jnp.int32),
        mask_BS=jnp.zeros((batch, slots), bool),
        next_slot=jnp.zeros((), jnp.int32),
    )


class LayerStack(nn.Module):
    """Declares the stacked parameters of all layers; call it to get them as a dict."""

    spec: DecoderSpec
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> dict:
        inits = {
            "proj": _KERNEL_INIT,
            "bias": nn.initializers.zeros,
            "norm": nn.initializers.constant(1.0 - self.spec.norm_offset),
        }
        return {
            name: self.param(name, inits[name.rpartition("_")[2]], shape, self.param_dtype)
            for name, shape in layer_shapes(self.spec).items()
        }


class Decoder(nn.Module):
    """A causal decoder. Hidden states come out; `unembed` turns the chosen ones into logits.

    Attributes:
      spec: the family's numbers.
      param_dtype: dtype of freshly initialised parameters (loaded ones keep their own).
      compute_dtype: dtype of the matrix products; norms, softmax and logits are float32.
      remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    spec: DecoderSpec
    param_dtype: jnp.dtype = jnp.float32
    compute_dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self):
        spec = self.spec
        table = (spec.vocab_size, spec.width)
        self.embedding = self.param("embedding", _KERNEL_INIT, table, self.param_dtype)
        self.layers = LayerStack(spec, self.param_dtype)
        norm_init = nn.initializers.constant(1.0 - spec.norm_offset)
        self.final_norm = self.param("final_norm", norm_init, (spec.width,), self.param_dtype)
        if not spec.tied_embedding:
            self.unembedding = self.param("unembedding", _KERNEL_INIT, table, self.param_dtype)

    def __call__(self, tokens_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Hidden states [B,T,D] after the final norm, in the compute dtype.

        Args:
          tokens_BT: integer ids.
          mask_BT: which of them are real; padding may stand left or right, not in the middle.
        """
        mask_BT = mask_BT.astype(bool)
        hidden_BTD, _ = self._run(tokens_BT, mask_BT, _positions(mask_BT), None)
        return hidden_BTD

    def extend(
        self, tokens_BT: jax.Array, mask_BT: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Reads T more tokens of each row after those in the cache -> (hidden [B,T,D], cache).

        The caller sees to it that T free slots are left: a full cache cannot be detected here.
        """
        mask_BT = mask_BT.astype(bool)
        read_B1 = jnp.sum(cache.mask_BS, axis=1, keepdims=True, dtype=jnp.int32)
        positions_BT = _positions(mask_BT) + read_B1
        hidden_BTD, (k_new, v_new) = self._run(tokens_BT, mask_BT, positions_BT, cache)
        at = cache.next_slot
        return hidden_BTD, Cache(
            k_LBSGC=jax.lax.dynamic_update_slice_in_dim(cache.k_LBSGC, k_new, at, axis=2),
            v_LBSGC=jax.lax.dynamic_update_slice_in_dim(cache.v_LBSGC, v_new, at, axis=2),
            positions_BS=jax.lax.dynamic_update_slice_in_dim(
                cache.positions_BS, positions_BT, at, axis=1
            ),
            mask_BS=jax.lax.dynamic_update_slice_in_dim(cache.mask_BS, mask_BT, at, axis=1),
            next_slot=at + tokens_BT.shape[1],
        )

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> float32 logits [..., V]."""
        tied = self.spec.tied_embedding
        return unembed(
            hidden, self.embedding if tied else self.unembedding, self.spec.final_softcap
        )

    def _run(self, tokens_BT, mask_BT, positions_BT, cache):
        spec = self.spec
        scale = jnp.asarray(spec.embedding_scale, self.embedding.dtype)
        x_BTD = (self.embedding[tokens_BT] * scale).astype(self.compute_dtype)
        attention = _attention_kinds(spec, mask_BT, positions_BT, cache)

        def layer_body(x_BTD, scanned):
            layer, is_global, cached_kv = scanned
            normed = _norm(spec, x_BTD, layer["attn_norm"])
            q, k, v = _project(spec, normed, layer)
            out_BTD, k = attention(is_global, q, k, v, cached_kv)
            out_BTD = dense(out_BTD, layer["o_proj"])
            if spec.post_norms:
                out_BTD = _norm(spec, out_BTD, layer["attn_post_norm"])
            x_BTD = x_BTD + out_BTD
            out_BTD = gated_mlp(_norm(spec, x_BTD, layer["mlp_norm"]), layer, spec.activation)
            if spec.post_norms:
                out_BTD = _norm(spec, out_BTD, layer["mlp_post_norm"])
            return x_BTD + out_BTD, None if cache is None else (k, v)

        if self.remat:
            layer_body = jax.checkpoint(layer_body, prevent_cse=False)
        cached = None if cache is None else (cache.k_LBSGC, cache.v_LBSGC)
        x_BTD, new_kv = jax.lax.scan(
            layer_body, x_BTD, (self.layers(), jnp.asarray(spec.is_global_L), cached)
        )
        return _norm(spec, x_BTD, self.final_norm), new_kv


def unembedding_table(spec: DecoderSpec, params: dict) -> jax.Array:
    """[V,D] of a decoder's parameters: what its hidden states are projected with."""
    return params["embedding" if spec.tied_embedding else "unembedding"]


def _positions(mask_BT: jax.Array) -> jax.Array:
    """Position of each token within its row, from 0; padding repeats its neighbour's.

    mask 0 0 1 1 1 -> 0 0 0 1 2 and mask 1 1 1 0 0 -> 0 1 2 2 2.
    """
    return jnp.maximum(jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32) - 1, 0)


def _norm(spec: DecoderSpec, x: jax.Array, scale: jax.Array) -> jax.Array:
    return rms_norm(x, scale, eps=spec.norm_eps, offset=spec.norm_offset)


def _project(spec: DecoderSpec, x_BTD: jax.Array, layer: dict):
    heads = (*x_BTD.shape[:2], -1, spec.head_dim)

    def project(name):
        out_BTX = dense(x_BTD, layer[f"{name}_proj"])
        if spec.qkv_bias:
            out_BTX += layer[f"{name}_bias"].astype(out_BTX.dtype)[None, None, :]
        return out_BTX.reshape(heads)

    q_BTHC, k_BTGC, v_BTGC = project("q"), project("k"), project("v")
    if spec.qk_norm:
        q_BTHC = _norm(spec, q_BTHC, layer["q_norm"])
        k_BTGC = _norm(spec, k_BTGC, layer["k_norm"])
    return q_BTHC, k_BTGC, v_BTGC


def _attention_kinds(spec: DecoderSpec, mask_BT, positions_BT, cache: Cache | None):
    """-> attention(is_global, q, k, v, cached_kv) -> (out [B,T,H*C], rotated k [B,T,G*C]).

    What depends on positions alone (angles, masks) is made here, once for all layers.
    """

    def branch(rope, window):
        angles = rotation(positions_BT, rope, spec.head_dim)
        visible_new = _visible(positions_BT, positions_BT, mask_BT, window)
        if cache is not None:
            visible_old = _visible(positions_BT, cache.positions_BS, cache.mask_BS, window)

        def attention(q, k, v, cached_kv):
            q, k = rotate(q, angles), rotate(k, angles)
            sources = [KeyValues(k, v, visible_new)]
            if cached_kv is not None:
                sources.insert(0, KeyValues(*cached_kv, visible_old))
            return attend(q, sources, spec.query_scale), k

        return attention

    global_branch = branch(spec.rope_global, None)
    if all(spec.is_global_L):
        return lambda is_global, *qkv: global_branch(*qkv)
    local_branch = branch(spec.rope_local, spec.window)
    if not any(spec.is_global_L):
        return lambda is_global, *qkv: local_branch(*qkv)
    return lambda is_global, *qkv: jax.lax.cond(is_global, global_branch, local_branch, *qkv)


def _visible(query_BT, key_BS, key_mask_BS, window: int | None) -> jax.Array:
    """bool [B,T,S]: causal, real keys only, and within the window where there is one.

    One row of keys 0..4, all real, window 2: the query at 3 sees 0 0 1 1 0.
    A query equal in position to a padded key does not see it: the mask says so.
    """
    distance_BTS = query_BT[:, :, None] - key_BS[:, None, :]
    visible_BTS = (distance_BTS >= 0) & key_mask_BS[:, None, :]
    return visible_BTS if window is None else visible_BTS & (distance_BTS < window)
