"""LoRA as a transform of a parameter tree (Hu et al. 2021, arXiv:2106.09685).

Adapters are a tree of their own, path -> `Adapter`: map over that one, never over an attached tree
(its kernels are `LoraKernel` nodes, whose frozen part would be mapped too).
"""

import dataclasses
import functools
import re
import zlib

import jax
import jax.numpy as jnp

from gkdjax.config import Lora
from gkdjax.models.layers import LoraKernel
from gkdjax.utils import tree

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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


def init(rng: jax.Array, params: dict, rules: Lora) -> dict[str, Adapter]:
    """New adapters, an identity: `a` uniform in ±1/sqrt(in) (as PEFT has it), b zero.

    Their values depend on the key and on a kernel's path only; `params` may be shapes.

    Raises:
      ValueError: a target that matches no kernel; it is named, and the kernels there are.
    """
    adapters, kernels = {}, _kernels(params)
    for path in _target_paths(kernels, rules.targets):
        L, fan_in, fan_out = kernels[path].shape
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

    A key turns dropout on (training), None turns it off.

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
    """`params` with `merged` kernels in place of the adapted ones.

    Raises:
      ValueError: as `attach`.
    """
    return _replace(params, adapters, lambda path, w, adapter: merged(w, adapter))


def merged(w: jax.Array, adapter: Adapter) -> jax.Array:
    """Kernels [L, in, out] plus scale * a @ b, summed in float32, in w's dtype."""
    update = jnp.einsum("Lir,Lro->Lio", adapter.a, adapter.b, precision="highest")
    return (w.astype(jnp.float32) + adapter.scale * update).astype(w.dtype)


def student_params(frozen: dict | None, trainable, dropout_rng: jax.Array | None = None) -> dict:
    """Parameters for `decoder.apply`: adapters on their frozen base, or all of them trained."""
    return trainable if frozen is None else attach(frozen, trainable, dropout_rng)


def _target_paths(kernels: dict, targets: tuple[str, ...] | str) -> list[str]:
    targets = ALL_LINEAR if targets == "all-linear" else targets
    if isinstance(targets, str) or not targets:
        raise ValueError(f"lora targets must be a list of names or 'all-linear', not {targets!r}")
    rules = [(rule if "/" in rule else f"layers/({rule})", True) for rule in targets]
    try:
        chosen = tree.match([*rules, (".*", False)], kernels)
    except re.error as error:
        raise ValueError(f"lora targets {targets!r}: no regular expression: {error}") from None
    return [path for path, is_target in chosen.items() if is_target]


def _kernels(params: dict) -> dict[str, jax.Array]:
    return {f"layers/{n}": w for n, w in params["layers"].items() if n.endswith("_proj")}


def _replace(params: dict, adapters: dict[str, Adapter], kernel) -> dict:
    layers, kernels = dict(params["layers"]), _kernels(params)
    for path, adapter in adapters.items():
        if path not in kernels:
            raise ValueError(
                f"adapter {path!r} has no kernel in this model; there are {[*kernels]}"
            )
        w = kernels[path]
        (L, fan_in, fan_out), rank = w.shape, adapter.a.shape[-1]
        if (adapter.a.shape, adapter.b.shape) != ((L, fan_in, rank), (L, rank, fan_out)):
            raise ValueError(
                f"adapter {path!r} has shapes {adapter.a.shape} and {adapter.b.shape}, which do not"
                f" fit the kernel's {w.shape}: was it trained on another base?"
            )
        layers[path.removeprefix("layers/")] = kernel(path, w, adapter)
    return {**params, "layers": layers}
