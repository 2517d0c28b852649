"""A vocabulary of which each device has a part, and what the devices ask each other about it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ShardedVocab(NamedTuple):
    """Parts of equal size lie along a mesh axis, in the order of their ids; hashable.

    All methods are for code within `jax.shard_map`, and are the plain thing where `axis` is None.
    Shape letters: V tokens of this device's part, K ids.
    """

    axis: str | None = None  # None: each device has all of it

    def size(self, part: int) -> int:
        """Of the whole, from that of a part."""
        return part if self.axis is None else part * jax.lax.axis_size(self.axis)

    def add(self, x: jax.Array) -> jax.Array:
        """The sum of what each device has."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest of what each device has, without a gradient."""
        x = jax.lax.stop_gradient(x)
        return x if self.axis is None else jax.lax.pmax(x, self.axis)

    def join(self, x_V: jax.Array) -> jax.Array:
        """[..., V of the whole]; for a few tokens, as they are all sent to each device."""
        if self.axis is None:
            return x_V
        return jax.lax.all_gather(x_V, self.axis, axis=x_V.ndim - 1, tiled=True)

    def places(self, ids_K: jax.Array, part: int) -> jax.Array:
        """Of ids within this device's part; `part`, which is out of range, for those elsewhere."""
        if self.axis is None:
            return ids_K
        places_K = ids_K - jax.lax.axis_index(self.axis) * part
        return jnp.where((places_K >= 0) & (places_K < part), places_K, part)

    def look_up(self, x_V: jax.Array, ids_K: jax.Array) -> jax.Array:
        """[..., V] at non-negative ids; NaN where one is not in the whole vocabulary."""
        part = x_V.shape[-1]
        if self.axis is None:
            return jnp.take_along_axis(x_V, ids_K, axis=-1, mode="fill")
        found_K = jnp.take_along_axis(
            x_V, self.places(ids_K, part), axis=-1, mode="fill", fill_value=0
        )
        return jnp.where(ids_K < self.size(part), self.add(found_K), jnp.nan)

    def merge(
        self, values_K: jax.Array, places_K: jax.Array, part: int, k: int
    ) -> tuple[jax.Array, jax.Array]:
        """The k largest of the whole -> (values, ids), from each device's own, best first.

        The lowest id comes first among equals, as it does in each part.
        """
        if self.axis is None:
            return values_K, places_K
        ids_K = places_K + jax.lax.axis_index(self.axis) * part
        values, ids = self.join(values_K), self.join(ids_K)
        best_K, at_K = jax.lax.top_k(values, k)
        return best_K, jnp.take_along_axis(ids, at_K, axis=-1)
