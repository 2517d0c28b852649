"""The decoder's parts as plain functions of arrays.

Shape letters: B batch, T query positions, S key positions, D width, F MLP width, H query heads,
G key/value heads, R = H / G query heads that share one key, C channels of a head, r LoRA rank.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gkdjax.models.decoder_config import RopeSpec


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("w", "a", "b", "dropout_key"),
    meta_fields=("scale", "dropout"),
)
@dataclasses.dataclass(frozen=True)
class LoraKernel:
    """A kernel with a low-rank update beside it: w + scale * a @ b, which is never formed.

    `w` comes first on purpose: linen compares the shape of a parameter's first leaf with the
    declared one. Each leaf may have a leading layer axis, which `lax.scan` removes.
    """

    w: jax.Array  # [in, out], the frozen base, any float dtype
    a: jax.Array  # float32 [in, r]
    b: jax.Array  # float32 [r, out]
    dropout_key: jax.Array | None  # a key drops inputs of `a` (training); None drops nothing
    scale: float
    dropout: float


def dense(x: jax.Array, kernel: jax.Array | LoraKernel) -> jax.Array:
    """x[..., in] @ kernel[in, out] in x's dtype, with the low-rank update of a `LoraKernel`.

    LoRA: x W + scale * drop(x) A B (Hu et al. 2021, arXiv:2106.09685, eq. 3).
    """
    # A matrix of rows: XLA's CPU backend takes three times as long for the gradient of a kernel
    # when two axes, batch and position, are contracted.
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(kernel, LoraKernel):
        out = rows @ kernel.w.astype(x.dtype)
        if kernel.dropout_key is not None and kernel.dropout > 0.0:
            keep = jax.random.bernoulli(kernel.dropout_key, 1.0 - kernel.dropout, rows.shape)
            rows = jnp.where(keep, rows / (1.0 - kernel.dropout), 0.0).astype(x.dtype)
        out += (rows @ kernel.a.astype(x.dtype)) @ kernel.b.astype(x.dtype) * kernel.scale
    else:
        out = rows @ kernel.astype(x.dtype)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float, offset: float) -> jax.Array:
    """x / rms(x) * (scale + offset) over the last axis; variance and product in float32."""
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    scale32 = scale.astype(jnp.float32) + offset
    scale32 = scale32.reshape((1,) * (x.ndim - 1) + scale32.shape)
    return (x32 * inverse_rms * scale32).astype(x.dtype)


def rotation(positions_BT: jax.Array, rope: RopeSpec, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B,T,1,C/2], of rotary angles (Su et al. 2021, arXiv:2104.09864).

    Llama 3's frequencies: see `Llama3Scaling` (Grattafiori et al. 2024, arXiv:2407.21783).
    """
    exponent_c = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency_c = 1.0 / (rope.theta**exponent_c) / rope.linear_factor
    if (scaling := rope.llama3) is not None:
        turns_c = scaling.original_length * frequency_c / (2.0 * jnp.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        fast_c = jnp.clip((turns_c - low) / (high - low), 0.0, 1.0)
        frequency_c = frequency_c * (fast_c + (1.0 - fast_c) / scaling.factor)
    angle = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency_c[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHC: jax.Array, by: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Half-split rotation: channel c is paired with channel c + C/2, as in the HF checkpoints."""
    cos, sin = by
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHC.dtype)


_ACTIVATIONS = {"gelu_tanh": functools.partial(jax.nn.gelu, approximate=True), "silu": jax.nn.silu}


def gated_mlp(x_BTD: jax.Array, layer: dict, activation: str) -> jax.Array:
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""
    gate_BTF = _ACTIVATIONS[activation](dense(x_BTD, layer["gate_proj"]))
    return dense(gate_BTF * dense(x_BTD, layer["up_proj"]), layer["down_proj"])
