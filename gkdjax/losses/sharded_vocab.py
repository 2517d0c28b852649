"""A vocabulary sharded over devices, and the exchanges between them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class ShardedVocab(NamedTuple):
    """Shards of equal size along a mesh axis, in the order of their ids; hashable.

    The methods are for code within `jax.shard_map`; with axis None they exchange nothing. Letters:
    V tokens of this device's shard, K ids. `part` is the size of a shard.
    """

    axis: str | None = None  # None: each device has the whole vocabulary

    def size(self, part: int) -> int:
        """-> the size of the whole vocabulary."""
        return part if self.axis is None else part * jax.lax.axis_size(self.axis)

    def add(self, x: Array) -> Array:
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def largest(self, x: Array) -> Array:
        """The maximum over devices, without a gradient."""
        x = jax.lax.stop_gradient(x)
        return x if self.axis is None else jax.lax.pmax(x, self.axis)

    def join(self, x_V: Array) -> Array:
        """Gathers all shards on each device, for a few tokens."""
        if self.axis is None:
            return x_V
        return jax.lax.all_gather(x_V, self.axis, axis=x_V.ndim - 1, tiled=True)

    def places(self, ids_K: Array, part: int) -> Array:
        """Ids -> places in this device's shard, or `part`, out of range, for ids of another."""
        if self.axis is None:
            return ids_K
        places_K = ids_K - jax.lax.axis_index(self.axis) * part
        return jnp.where((places_K >= 0) & (places_K < part), places_K, part)

    def look_up(self, x_V: Array, ids_K: Array) -> Array:
        """[..., V] at non-negative ids; NaN for one that is not in the whole vocabulary."""
        part = x_V.shape[-1]
        if self.axis is None:
            return jnp.take_along_axis(x_V, ids_K, axis=-1, mode="fill")
        places_K = self.places(ids_K, part)
        found_K = jnp.take_along_axis(x_V, places_K, axis=-1, mode="fill", fill_value=0)
        return jnp.where(ids_K < self.size(part), self.add(found_K), jnp.nan)

    def merge(self, values_K: Array, places_K: Array, part: int, k: int) -> tuple[Array, Array]:
        """The best of each shard -> (values, ids) of the k best, lowest id first among equals."""
        if self.axis is None:
            return values_K, places_K
        ids_K = places_K + jax.lax.axis_index(self.axis) * part
        values, ids = self.join(values_K), self.join(ids_K)
        best_K, at_K = jax.lax.top_k(values, k)
        return best_K, jnp.take_along_axis(ids, at_K, axis=-1)
