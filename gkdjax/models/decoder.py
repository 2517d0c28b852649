"""The one decoder of all families: linen declares the parameters, plain functions compute.

Shape letters as in `gkdjax.models.layers`, and L layers, V vocabulary.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from gkdjax.losses.lm_head import unembed
from gkdjax.models.attention import attention_of
from gkdjax.models.decoder_config import DecoderConfig, layer_shapes, param_shapes
from gkdjax.models.kv_cache import Cache, Prefix, index_in_stack, init_cache, prefix_of, write
from gkdjax.models.layers import dense, gated_mlp, rms_norm
from gkdjax.parallel.sharding_rules import ShardingRules, all_but_gathered_weights

_KERNEL_INIT = nn.initializers.normal(0.02)


class LayerStack(nn.Module):
    """Declares the stacked parameters of all layers; call it to get them as a dict."""

    spec: DecoderConfig
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
      layout: how parameters and rows lie on a mesh.
    """

    spec: DecoderConfig
    param_dtype: jnp.dtype = jnp.float32
    compute_dtype: jnp.dtype = jnp.float32
    remat: bool = False
    layout: ShardingRules = ShardingRules()

    def setup(self):
        spec = self.spec
        table = (spec.vocab_size, spec.width)
        self.embedding = self.param("embedding", _KERNEL_INIT, table, self.param_dtype)
        self.layers = LayerStack(spec, self.param_dtype)
        norm_init = nn.initializers.constant(1.0 - spec.norm_offset)
        self.final_norm = self.param("final_norm", norm_init, (spec.width,), self.param_dtype)
        if not spec.tied_embedding:
            self.unembedding = self.param("unembedding", _KERNEL_INIT, table, self.param_dtype)

    def __call__(
        self, tokens_BT: jax.Array, mask_BT: jax.Array, prefix: Prefix | None = None
    ) -> jax.Array:
        """Hidden states [B,T,D] after the final norm, in the compute dtype.

        Args:
          tokens_BT: integer ids.
          mask_BT: which of them are real; padding may stand left or right, not in the middle.
          prefix: from `read_prefix`: what every row has read before its own tokens.
        """
        mask_BT = mask_BT.astype(bool)
        positions_BT = _positions(mask_BT) + _length(prefix)
        return self._run(tokens_BT, mask_BT, positions_BT, prefix=prefix)[0]

    def prefill(
        self,
        tokens_BT: jax.Array,
        mask_BT: jax.Array,
        slots: int,
        prefix: Prefix | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Reads the start of each row -> (hidden [B,T,D], a cache of `slots` tokens a row).

        As `extend` of an empty cache, whose slots it does not look at.
        """
        mask_BT = mask_BT.astype(bool)
        positions_BT = _positions(mask_BT) + _length(prefix)
        hidden_BTD, new_kv = self._run(tokens_BT, mask_BT, positions_BT, prefix=prefix, keep=True)
        cache = init_cache(self.spec, mask_BT.shape[0], slots, self.compute_dtype)
        return hidden_BTD, write(self.spec, cache, *new_kv, positions_BT, mask_BT)

    def extend(
        self,
        tokens_BT: jax.Array,
        mask_BT: jax.Array,
        cache: Cache,
        prefix: Prefix | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Reads T more tokens of each row after those in the cache -> (hidden [B,T,D], cache).

        Args:
          tokens_BT: integer ids.
          mask_BT: which of them are real: padding stands left of a row's first token, or right of
            its last one for good, because the ring of a local layer holds columns, not tokens.
          cache: from `prefill` or `kv_cache.init_cache`. The caller sees to it that T slots are
            left, as a full cache cannot be detected here.
          prefix: the same at each call: what every row has read before the tokens in the cache.
        """
        mask_BT = mask_BT.astype(bool)
        positions_BT = _positions(mask_BT) + cache.real_B[:, None] + _length(prefix)
        hidden_BTD, new_kv = self._run(tokens_BT, mask_BT, positions_BT, cache, prefix)
        return hidden_BTD, write(self.spec, cache, *new_kv, positions_BT, mask_BT)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> float32 logits [..., V]."""
        tied = self.spec.tied_embedding
        return unembed(
            hidden, self.embedding if tied else self.unembedding, self.spec.final_softcap
        )

    def _run(self, tokens_BT, mask_BT, positions_BT, cache=None, prefix=None, keep=False):
        """-> (hidden [B,T,D], the new keys and values [L,B,T,G,C] if there is a use for them)."""
        spec = self.spec
        keep = keep or cache is not None
        scale = jnp.asarray(spec.embedding_scale, self.embedding.dtype)
        layout = self.layout
        x_BTD = (layout.table(self.embedding)[tokens_BT] * scale).astype(self.compute_dtype)
        x_BTD = layout.rows(x_BTD)
        attention = attention_of(spec, mask_BT, positions_BT, cache, prefix)

        def layer_body(x_BTD, scanned):
            layer, is_global, index = scanned
            layer = layout.layer(layer)
            normed = _norm(spec, x_BTD, layer["attn_norm"])
            q, k, v = map(layout.heads, _project(spec, normed, layer))
            out_BTD, k = attention(is_global, index, q, k, v)
            out_BTD = dense(out_BTD, layer["o_proj"])
            if spec.post_norms:
                out_BTD = _norm(spec, out_BTD, layer["attn_post_norm"])
            x_BTD = x_BTD + out_BTD
            out_BTD = gated_mlp(_norm(spec, x_BTD, layer["mlp_norm"]), layer, spec.activation)
            if spec.post_norms:
                out_BTD = _norm(spec, out_BTD, layer["mlp_post_norm"])
            return layout.rows(x_BTD + out_BTD), (k, v) if keep else None

        if self.remat:
            layer_body = jax.checkpoint(layer_body, prevent_cse=False)
        elif layout.cuts_weights:
            layer_body = jax.checkpoint(
                layer_body, prevent_cse=False, policy=all_but_gathered_weights
            )
        kinds = jnp.asarray(spec.is_global_L), index_in_stack(spec)
        x_BTD, new_kv = jax.lax.scan(layer_body, x_BTD, (self.layers(), *kinds))
        return _norm(spec, x_BTD, self.final_norm), new_kv


def read_prefix(
    decoder: Decoder, params: dict, tokens_1P: jax.Array, mask_1P: jax.Array, chunk: int = 1024
) -> Prefix:
    """What all rows begin with, read once, to be attended to without a copy per row.

    Args:
      decoder: any.
      params: its parameters.
      tokens_1P: integer ids, one batch row.
      mask_1P: which of them are real; padding stands left.
      chunk: tokens read at once: a global layer holds float32 scores [heads, chunk, P].
    """
    apply = functools.partial(decoder.apply, {"params": params})
    P, mask_1P = tokens_1P.shape[1], mask_1P.astype(bool)
    first = P - (P - 1) // chunk * chunk
    _, cache = apply(tokens_1P[:, :first], mask_1P[:, :first], P, method="prefill")

    def read(cache, piece):
        return apply(*piece, cache, method="extend")[1], None

    if first < P:
        pieces = (x_1P[:, first:].reshape(-1, 1, chunk) for x_1P in (tokens_1P, mask_1P))
        cache, _ = jax.lax.scan(read, cache, tuple(pieces))
    return prefix_of(cache)


def abstract_params(spec: DecoderConfig, dtype: jnp.dtype) -> dict:
    """A decoder's parameters as `jax.ShapeDtypeStruct`, of one dtype."""
    shapes = param_shapes(spec).items()
    leaves = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes}
    return traverse_util.unflatten_dict(leaves, sep="/")


def unembedding_table(spec: DecoderConfig, params: dict) -> jax.Array:
    """[V,D] of a decoder's parameters: what its hidden states are projected with."""
    return params["embedding" if spec.tied_embedding else "unembedding"]


def _positions(mask_BT: jax.Array) -> jax.Array:
    """Position of each token within its row, from 0; padding repeats its neighbour's.

    mask 0 0 1 1 1 -> 0 0 0 1 2 and mask 1 1 1 0 0 -> 0 1 2 2 2.
    """
    return jnp.maximum(jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32) - 1, 0)


def _length(prefix: Prefix | None):
    return 0 if prefix is None else prefix.length


def _norm(spec: DecoderConfig, x: jax.Array, scale: jax.Array) -> jax.Array:
    return rms_norm(x, scale, eps=spec.norm_eps, offset=spec.norm_offset)


def _project(spec: DecoderConfig, x_BTD: jax.Array, layer: dict):
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
