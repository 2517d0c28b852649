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
from gkdjax.models.kv_cache import Cache, index_in_stack, init_cache, write
from gkdjax.models.layers import dense, gated_mlp, rms_norm
from gkdjax.parallel.sharding_rules import ShardingRules, all_but_gathered_weights


def _initializer(spec: DecoderConfig, name: str):
    if name.endswith("_norm"):
        return nn.initializers.constant(1.0 - spec.norm_offset)
    return nn.initializers.zeros if name.endswith("_bias") else nn.initializers.normal(0.02)


class LayerStack(nn.Module):
    """Declares the stacked parameters of all layers; a call returns them as a dict."""

    spec: DecoderConfig
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> dict:
        return {
            name: self.param(name, _initializer(self.spec, name), shape, self.param_dtype)
            for name, shape in layer_shapes(self.spec).items()
        }


class Decoder(nn.Module):
    """A causal decoder that returns hidden states; `unembed` turns the chosen ones into logits.

    All methods take integer ids [B,T] and a mask of those that are real. `prefix`, from
    `read_prefix`, is the text that every row has read before its own tokens.
    """

    spec: DecoderConfig
    param_dtype: jnp.dtype = jnp.float32  # of new parameters; loaded ones keep their own
    compute_dtype: jnp.dtype = jnp.float32  # of matrix products; norms, softmax, logits: float32
    remat: bool = False  # the backward pass computes each layer again instead of keeping it
    layout: ShardingRules = ShardingRules()  # of parameters and rows on a mesh

    def setup(self):
        spec = self.spec
        self.layers = LayerStack(spec, self.param_dtype)
        for name, shape in param_shapes(spec).items():
            if "/" not in name:  # embedding, final_norm, unembedding
                made = self.param(name, _initializer(spec, name), shape, self.param_dtype)
                setattr(self, name, made)

    def __call__(
        self, tokens_BT: jax.Array, mask_BT: jax.Array, prefix: Cache | None = None
    ) -> jax.Array:
        """Hidden states [B,T,D] after the final norm, in the compute dtype.

        Padding may stand left or right of a row's tokens, not between them.
        """
        return self._read(tokens_BT, mask_BT, prefix)[0]

    def prefill(
        self, tokens_BT: jax.Array, mask_BT: jax.Array, slots: int, prefix: Cache | None = None
    ) -> tuple[jax.Array, Cache]:
        """Reads the start of each row -> (hidden [B,T,D], a cache of `slots` tokens a row).

        It equals `extend` of an empty cache, without attention to empty slots.
        """
        cache = init_cache(self.spec, mask_BT.shape[0], slots, self.compute_dtype)
        return self._read(tokens_BT, mask_BT, prefix, into=cache)

    def extend(
        self, tokens_BT: jax.Array, mask_BT: jax.Array, cache: Cache, prefix: Cache | None = None
    ) -> tuple[jax.Array, Cache]:
        """Reads T more tokens of each row after those in the cache -> (hidden [B,T,D], cache).

        Padding stands left of a row's first token, or right of its last one for good: the ring of a
        local layer holds columns, not tokens. The cache, from `prefill` or `kv_cache.init_cache`,
        must have T free slots, which nothing here can check. `prefix` is the same at each call.
        """
        return self._read(tokens_BT, mask_BT, prefix, after=cache, into=cache)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> float32 logits [..., V]."""
        table = self.embedding if self.spec.tied_embedding else self.unembedding
        return unembed(hidden, table, self.spec.final_softcap)

    def _read(
        self,
        tokens_BT: jax.Array,
        mask_BT: jax.Array,
        prefix: Cache | None,
        after: Cache | None = None,
        into: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """-> (hidden [B,T,D], `into` with the new keys and values)."""
        spec, layout, mask_BT = self.spec, self.layout, mask_BT.astype(bool)
        # From 0; padding repeats its neighbour's: mask 0 0 1 1 -> 0 0 0 1, 1 1 0 0 -> 0 1 1 1.
        positions_BT = jnp.maximum(jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32) - 1, 0)
        if after is not None:
            positions_BT += after.real_B[:, None]
        if prefix is not None:
            positions_BT += prefix.real_B[:, None]
        scale = jnp.asarray(spec.embedding_scale, self.embedding.dtype)
        x_BTD = (layout.table(self.embedding)[tokens_BT] * scale).astype(self.compute_dtype)
        attention = attention_of(spec, mask_BT, positions_BT, after, prefix)
        norm = functools.partial(rms_norm, eps=spec.norm_eps, offset=spec.norm_offset)

        def layer_body(x_BTD, scanned):
            layer, is_global, index = scanned
            layer = layout.layer(layer)
            q, k, v = map(layout.heads, _project(spec, norm, x_BTD, layer))
            out_BTD, k = attention(is_global, index, q, k, v)
            out_BTD = dense(out_BTD, layer["o_proj"])
            if spec.post_norms:
                out_BTD = norm(out_BTD, layer["attn_post_norm"])
            x_BTD = x_BTD + out_BTD
            out_BTD = gated_mlp(norm(x_BTD, layer["mlp_norm"]), layer, spec.activation)
            if spec.post_norms:
                out_BTD = norm(out_BTD, layer["mlp_post_norm"])
            return layout.rows(x_BTD + out_BTD), None if into is None else (k, v)

        if self.remat:
            layer_body = jax.checkpoint(layer_body, prevent_cse=False)
        elif layout.cuts_weights:
            layer_body = jax.checkpoint(
                layer_body, prevent_cse=False, policy=all_but_gathered_weights
            )
        scanned = self.layers(), jnp.asarray(spec.is_global_L), index_in_stack(spec)
        x_BTD, new_kv = jax.lax.scan(layer_body, layout.rows(x_BTD), scanned)
        if into is not None:
            into = write(spec, into, *new_kv, positions_BT, mask_BT)
        return norm(x_BTD, self.final_norm), into


def _project(spec: DecoderConfig, norm, x_BTD: jax.Array, layer: dict) -> tuple[jax.Array, ...]:
    """Queries [B,T,H,C], keys and values [B,T,G,C] of a layer, not rotated yet."""
    x_BTD = norm(x_BTD, layer["attn_norm"])

    def project(name):
        out_BTX = dense(x_BTD, layer[f"{name}_proj"])
        if spec.qkv_bias:
            out_BTX += layer[f"{name}_bias"].astype(out_BTX.dtype)[None, None, :]
        out = out_BTX.reshape(*x_BTD.shape[:2], -1, spec.head_dim)
        return norm(out, layer[f"{name}_norm"]) if spec.qk_norm and name != "v" else out

    return project("q"), project("k"), project("v")


def read_prefix(
    decoder: Decoder, params: dict, tokens_1P: jax.Array, mask_1P: jax.Array, chunk: int = 1024
) -> Cache:
    """Reads the beginning of all rows once -> a cache of one row, for all of them to attend to.

    Padding stands left. `chunk` tokens are read at once, as a global layer holds float32 scores
    [heads, chunk, P].
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
    return cache


def abstract_params(spec: DecoderConfig, dtype: jnp.dtype) -> dict:
    """A decoder's parameters as `jax.ShapeDtypeStruct`, all of one dtype."""
    shapes = param_shapes(spec).items()
    leaves = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes}
    return traverse_util.unflatten_dict(leaves, sep="/")


def unembedding_table(spec: DecoderConfig, params: dict) -> jax.Array:
    """[V,D] of a decoder's parameters: what its hidden states are projected with."""
    return params["embedding" if spec.tied_embedding else "unembedding"]
