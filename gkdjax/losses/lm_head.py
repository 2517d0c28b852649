"""From hidden states to logits."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


def unembed(hidden: Array, table_VD: Array, softcap: float | None) -> Array:
    """Hidden states [..., D] and an unembedding -> float32 logits [..., V].

    The product is in the dtype of the hidden states; softcap c is c tanh(logits / c), None is none.
    """
    logits = jnp.einsum(
        "...D,VD->...V", hidden, table_VD.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


class Head(NamedTuple):
    """Softcap, then temperature; hashable."""

    softcap: float | None
    temperature: float

    def logits(self, hidden: Array, table_VD: Array) -> Array:
        return unembed(hidden, table_VD, self.softcap) / self.temperature

    def slope(self, scaled: Array) -> Array | float:
        """d logits / d (hidden @ table), from the logits."""
        if self.softcap is None:
            return 1.0 / self.temperature
        return (1.0 - jnp.square(scaled * self.temperature / self.softcap)) / self.temperature
