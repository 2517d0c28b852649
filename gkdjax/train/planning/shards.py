"""One device's part of a model: of its weights, and of what it computes with them."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh

from gkdjax.models.decoder_config import DecoderConfig, layer_shapes, param_shapes
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.parallel.sharding_rules import ShardingRules


@dataclasses.dataclass(frozen=True)
class Shard:
    """A model on one device of a mesh. All counts are of numbers, not of bytes."""

    spec: DecoderConfig  # of the whole model
    layout: ShardingRules

    @property
    def fsdp(self) -> int:
        return self.layout.mesh.shape["fsdp"]

    @property
    def tensor(self) -> int:
        return self.layout.mesh.shape["tensor"]

    @functools.cached_property
    def local(self) -> DecoderConfig:
        """The decoder that one device computes: its heads, MLP width and vocabulary.

        Where "tensor" exceeds the heads of keys and values, each device multiplies with one.
        """
        spec, tensor = self.spec, self.tensor
        return dataclasses.replace(
            spec,
            num_heads=spec.num_heads // tensor,
            num_kv_heads=max(spec.num_kv_heads // tensor, 1),
            ffn_width=spec.ffn_width // tensor,
            vocab_size=spec.vocab_size // tensor,
        )

    @functools.cached_property
    def held(self) -> int:
        """Parameters that lie here."""
        return _count(self.layout, param_shapes(self.spec))

    @functools.cached_property
    def gathered(self) -> int:
        """Parameters once they are gathered over "fsdp"."""
        return _count(self._gathered, param_shapes(self.spec))

    @functools.cached_property
    def layer(self) -> int:
        """Parameters of one layer, gathered."""
        return _count(self._gathered, _layer_paths(self.spec)) // self.spec.num_layers

    @functools.cached_property
    def kernels(self) -> int:
        """Parameters of all layers' kernels, gathered: a token is multiplied with them."""
        paths = _layer_paths(self.spec)
        return _count(
            self._gathered, {path: paths[path] for path in paths if path.endswith("_proj")}
        )

    @property
    def table(self) -> int:
        """Parameters of an embedding or unembedding, gathered."""
        return self.local.vocab_size * self.spec.width

    def held_of(self, leaves) -> int:
        """Counts a tree of `jax.ShapeDtypeStruct`s that the layout's rules cover."""
        sizes = jax.tree.map(
            lambda leaf, place: _size(place, leaf.shape), leaves, self.layout.shardings_of(leaves)
        )
        return sum(jax.tree.leaves(sizes))

    def kv_numbers(self, slots: int) -> int:
        """Keys and values of one row; local layers keep as many as their window."""
        spec = self.spec
        full = sum(spec.is_global_L)
        local = (spec.num_layers - full) * min(slots, spec.window or slots)
        return 2 * self.kv_heads * spec.head_dim * (full * slots + local)

    @property
    def kv_heads(self) -> int:
        """Whole where "tensor" does not divide them."""
        heads = self.spec.num_kv_heads
        return heads if heads % self.tensor else heads // self.tensor

    @property
    def _gathered(self) -> ShardingRules:
        sizes = self.layout.mesh.shape
        mesh = AbstractMesh((sizes["data"] * sizes["fsdp"], 1, sizes["tensor"]), parallel_mesh.AXES)
        return dataclasses.replace(self.layout, mesh=mesh)


def _layer_paths(spec: DecoderConfig) -> dict[str, tuple[int, ...]]:
    return {f"layers/{name}": shape for name, shape in layer_shapes(spec).items()}


def _count(layout: ShardingRules, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(_size(layout.sharding_of(path, shape), shape) for path, shape in shapes.items())


def _size(place: jax.sharding.NamedSharding, shape: tuple[int, ...]) -> int:
    return math.prod(place.shard_shape(shape))
