"""Which leaf lies how on a mesh, by rules over paths, and constraints for the decoder's arrays.

One table serves parameters, adapters, their optimizer state and a whole `TrainState`: a leaf's path
ends as its parameter's does.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from gkdjax.parallel.mesh import ROW_AXES, row_shares
from gkdjax.utils import tree
from gkdjax.utils.errors import UserError

Rule = tuple[str, PartitionSpec]

# Path regex -> how such a leaf is cut; the first that matches the whole path counts. Kernels are
# (L, in, out). A tensor-parallel pair (q, k, v, then o; gate and up, then down) is cut along what
# lies between the two, so that one sum over "tensor" is needed after the second alone. An adapter's
# a (L, in, r) and b (L, r, out) are cut where their kernel is.
RULES: tuple[Rule, ...] = (
    (r"(.*/)?layers/(q|k|v|gate|up)_proj(/w)?", PartitionSpec(None, "fsdp", "tensor")),
    (r"(.*/)?layers/(q|k|v|gate|up)_proj/a", PartitionSpec(None, "fsdp")),
    (r"(.*/)?layers/(q|k|v|gate|up)_proj/b", PartitionSpec(None, None, "tensor")),
    (r"(.*/)?layers/(o|down)_proj(/w)?", PartitionSpec(None, "tensor", "fsdp")),
    (r"(.*/)?layers/(o|down)_proj/a", PartitionSpec(None, "tensor")),
    (r"(.*/)?layers/(o|down)_proj/b", PartitionSpec(None, None, "fsdp")),
    (r"(.*/)?layers/[qkv]_bias", PartitionSpec(None, "tensor")),
    # [V, D]. Over "tensor" each device has logits of its own words; over "fsdp" a word's row is
    # cut, not the words, so that looking tokens up needs no device to search for them.
    (r"(.*/)?(un)?embedding", PartitionSpec("tensor", "fsdp")),
    (r"(.*/)?\w+_norm", PartitionSpec()),  # too small to be worth a gather
    (r"(.*/)?(step|count)", PartitionSpec()),  # of the run, of optax
)

# Where the devices along "tensor" do not divide the heads of keys and values, each has all of them.
_KV_WHOLE: tuple[Rule, ...] = (
    (r"(.*/)?layers/[kv]_proj((/w)|(/a))?", PartitionSpec(None, "fsdp")),
    (r"(.*/)?layers/[kv]_proj/b", PartitionSpec()),
    (r"(.*/)?layers/[kv]_bias", PartitionSpec()),
)


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The rules for one model on one mesh; hashable, so that programs can be made for it."""

    mesh: Mesh | AbstractMesh | None = None  # None: one device
    rules: tuple[Rule, ...] = RULES

    @classmethod
    def of(
        cls,
        mesh: Mesh | AbstractMesh,
        spec: Any,
        own: Sequence[Rule] = (),
        *,
        warn: bool = True,
    ) -> "ShardingRules":
        """The rules for a model with this decoder config; `own` come before `RULES`.

        Raises:
          UserError: the devices along "tensor" do not divide the query heads, or the vocabulary:
            the head's logits are cut along it whatever the rules say about its table.
        """
        tensor = mesh.shape["tensor"]
        vocabulary = f"embedding: a vocabulary of {spec.vocab_size}"
        heads = f"layers/q_proj: {spec.num_heads} attention heads"
        for what, size in ((vocabulary, spec.vocab_size), (heads, spec.num_heads)):
            if size % tensor:
                raise UserError(f"{what} {_cannot_be_cut(size, 'tensor', tensor)}")
        if spec.num_kv_heads % tensor == 0:
            return cls(mesh, (*own, *RULES))
        if warn:
            logging.warning(
                "mesh.tensor=%d does not divide the %d heads of keys and values: each device"
                " computes and keeps them all, where an even share would be 1/%d of the cache and"
                " of the k and v products",
                *(tensor, spec.num_kv_heads, tensor),
            )
        return cls(mesh, (*own, *_KV_WHOLE, *RULES))

    def sharding_of(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """How a leaf lies; an error names it if no rule covers it or an axis does not divide."""
        cut = self._cut(path)
        if len(cut) > len(shape):
            raise UserError(f"{path}: {cut} has more axes than the leaf, which is {shape}")
        for dimension, axis in enumerate(cut):
            if axis is not None and shape[dimension] % self.mesh.shape[axis]:
                why = _cannot_be_cut(shape[dimension], axis, self.mesh.shape[axis])
                raise UserError(f"{path}: dimension {dimension} of {shape} {why}")
        return NamedSharding(self.mesh, self._used(cut))

    def shardings_of(self, of: Any) -> Any:
        """`sharding_of` each leaf of a tree of arrays or `jax.ShapeDtypeStruct`s."""
        return tree.map_with_path(lambda path, leaf: self.sharding_of(path, leaf.shape), of)

    @property
    def cuts_weights(self) -> bool:
        """Otherwise each device has all of them, and the methods below change nothing."""
        if self.mesh is None:
            return False
        return self.mesh.shape["fsdp"] * self.mesh.shape["tensor"] > 1

    # What follows is for code that is traced: without it XLA is free to gather all layers at once,
    # or rows.

    def rows(self, x_B: jax.Array) -> jax.Array:
        """Cut along the first axis, a batch's rows, and nowhere else."""
        return self._constrain(x_B, self._row_axes(x_B))

    def heads(self, x_BTHC: jax.Array) -> jax.Array:
        """Queries, keys or values, cut along rows and heads."""
        if not self.cuts_weights:
            return x_BTHC
        divides = x_BTHC.shape[2] % self.mesh.shape["tensor"] == 0
        return self._constrain(x_BTHC, self._row_axes(x_BTHC), None, "tensor" if divides else None)

    def layer(self, leaves: dict[str, Any]) -> dict[str, Any]:
        """One layer's leaves, by name, while it computes: gathered over "fsdp"."""
        if not self.cuts_weights:
            return leaves

        def gather(path, leaf):
            if "dropout_key" in path:
                return leaf
            cut = self._cut(f"layers/{path}")[1:]
            return self._constrain(leaf, *(None if axis == "fsdp" else axis for axis in cut))

        return tree.map_with_path(gather, leaves)

    def table(self, table_VD: jax.Array) -> jax.Array:
        """An embedding that is looked up: gathered over "fsdp"."""
        return self._constrain(table_VD, "tensor")

    def _cut(self, path: str) -> PartitionSpec:
        cut = next((cut for rule, cut in self.rules if re.fullmatch(rule, path)), None)
        if cut is None:
            raise ValueError(f"no sharding rule covers the leaf {path!r}")
        return cut

    def _row_axes(self, x_B: jax.Array) -> tuple[str, ...] | None:
        """None for a single row, as a prefix that is read once: it is whole on every device."""
        if not self.cuts_weights:
            return None
        return ROW_AXES if x_B.shape[0] % row_shares(self.mesh) == 0 else None

    def _constrain(self, x: jax.Array, *cut: str | tuple[str, ...] | None) -> jax.Array:
        if not self.cuts_weights:
            return x
        # Within `jax.shard_map` some axes are the caller's: there each device has its own rows.
        around = jax.sharding.get_abstract_mesh()
        manual = set(around.manual_axes) if not around.empty else set()
        mesh = around if manual else self.mesh
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, self._used(cut, manual)))

    def _used(self, cut: Sequence, manual: set[str] = frozenset()) -> PartitionSpec:
        """`cut` without axes of one device: jit takes P("fsdp") and P() for two programs."""

        def used(axes):
            if isinstance(axes, tuple):
                left = tuple(axis for axis in axes if used(axis))
                return left if len(left) > 1 else next(iter(left), None)
            return axes if axes and axes not in manual and self.mesh.shape[axes] > 1 else None

        named = [used(axes) for axes in cut]
        while named and named[-1] is None:
            named.pop()
        return PartitionSpec(*named)


def _cannot_be_cut(size: int, axis: str, devices: int) -> str:
    return (
        f"cannot be cut by the {devices} devices of mesh axis {axis!r};"
        f" take {axis}={math.gcd(size, devices)}"
    )


def all_but_gathered_weights(primitive, *_, **__) -> bool:
    """A policy for `jax.checkpoint`: what a layer keeps for its backward pass.

    Weights are gathered by a sharding constraint and then cast: results of both are made again.
    """
    return primitive.name not in ("sharding_constraint", "convert_element_type")
