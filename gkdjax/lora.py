"""LoRA as a transform of a parameter tree (Hu et al. 2021, arXiv:2106.09685).

Adapters live in a tree of their own, path -> `Adapter`: map over that one, never over an attached
tree (its kernels are `LoraKernel` nodes, whose frozen part would be mapped too).
"""

import dataclasses
import functools
import re
import zlib

import jax
import jax.numpy as jnp

from gkdjax.models.layers import LoraKernel

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoraRules:
    """Which kernels are adapted, and how.

    Attributes:
      rank: r, columns of a.
      alpha: the update is scaled by alpha / rank.
      dropout: probability with which an input of `a` is dropped in training.
      targets: names of kernels, or regular expressions that match a whole path such as
        "layers/q_proj"; or the string "all-linear".
    """

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.05
    targets: tuple[str, ...] | str = ALL_LINEAR


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("a", "b"), meta_fields=("scale", "dropout")
)
@dataclasses.dataclass(frozen=True)
class Adapter:
    """One kernel's update, scale * a @ b; float32."""

    a: jax.Array  # [L, in, r]
    b: jax.Array  # [L, r, out]
    scale: float
    dropout: float


def init(rng: jax.Array, params: dict, rules: LoraRules) -> dict[str, Adapter]:
    """Fresh adapters of `params`, an identity: `a` uniform in ±1/sqrt(in) (as PEFT has it), b zero.

    Args:
      rng: a key; each kernel's draw depends on it and on the kernel's path only.
      params: the decoder's parameters (arrays or `jax.ShapeDtypeStruct`).
      rules: what to adapt.

    Raises:
      ValueError: a target that matches no kernel, named, with the kernels there are.
    """
    adapters = {}
    for path in _target_paths(params, rules.targets):
        L, fan_in, fan_out = _leaf(params, path).shape
        bound = fan_in**-0.5
        key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
        shape = (L, fan_in, rules.rank)
        adapters[path] = Adapter(
            a=jax.random.uniform(key, shape, jnp.float32, minval=-bound, maxval=bound),
            b=jnp.zeros((L, rules.rank, fan_out), jnp.float32),
            scale=rules.alpha / rules.rank,
            dropout=rules.dropout,
        )
    return adapters


def attach(
    params: dict, adapters: dict[str, Adapter], dropout_rng: jax.Array | None = None
) -> dict:
    """`params` with adapted kernels replaced by `LoraKernel` leaves, for `decoder.apply`.

    Args:
      params: the frozen base.
      adapters: from `init`.
      dropout_rng: a key turns dropout on (training); None turns it off.

    Raises:
      ValueError: an adapter whose path or shape does not fit `params`, named.
    """

    def kernel(path, w, adapter):
        keys = None
        if dropout_rng is not None and adapter.dropout > 0.0:
            key = jax.random.fold_in(dropout_rng, zlib.crc32(path.encode()))
            keys = jax.random.split(key, w.shape[0])
        return LoraKernel(w, adapter.a, adapter.b, keys, adapter.scale, adapter.dropout)

    return _replace(params, adapters, kernel)


def merge(params: dict, adapters: dict[str, Adapter]) -> dict:
    """`params` with w + scale * a @ b in place of each adapted w, summed in float32, in w's dtype.

    Raises:
      ValueError: as `attach`.
    """

    def kernel(path, w, adapter):
        update = jnp.einsum("Lir,Lro->Lio", adapter.a, adapter.b, precision="highest")
        return (w.astype(jnp.float32) + adapter.scale * update).astype(w.dtype)

    return _replace(params, adapters, kernel)


def _kernel_paths(params: dict) -> list[str]:
    return [f"layers/{name}" for name in params["layers"] if name.endswith("_proj")]


def _target_paths(params: dict, targets: tuple[str, ...] | str) -> list[str]:
    kernels = _kernel_paths(params)
    if targets == "all-linear":
        return kernels
    if isinstance(targets, str) or not targets:
        raise ValueError(f"lora targets must be a list of names or 'all-linear', not {targets!r}")
    chosen = set()
    for rule in targets:
        try:
            found = {p for p in kernels if p == f"layers/{rule}" or re.fullmatch(rule, p)}
        except re.error as error:
            raise ValueError(f"lora target {rule!r} is no regular expression: {error}") from None
        if not found:
            raise ValueError(f"lora target {rule!r} matches no kernel; there are {kernels}")
        chosen |= found
    return [path for path in kernels if path in chosen]


def _leaf(params: dict, path: str):
    node = params
    for name in path.split("/"):
        node = node[name]
    return node


def _replace(params: dict, adapters: dict[str, Adapter], make) -> dict:
    layers = dict(params["layers"])
    kernels = _kernel_paths(params)
    for path, adapter in adapters.items():
        if path not in kernels:
            raise ValueError(f"adapter {path!r} has no kernel in this model; there are {kernels}")
        name = path.removeprefix("layers/")
        w = layers[name]
        L, fan_in, fan_out = w.shape
        rank = adapter.a.shape[-1]
        if adapter.a.shape != (L, fan_in, rank) or adapter.b.shape != (L, rank, fan_out):
            raise ValueError(
                f"adapter {path!r} has shapes {adapter.a.shape} and {adapter.b.shape}, which do not"
                f" fit the kernel's {w.shape}: was it trained on another base?"
            )
        layers[name] = make(path, w, adapter)
    return {**params, "layers": layers}
