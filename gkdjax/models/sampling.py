"""Samples a token of each row from its logits: greedy, or by temperature, top k and top p.

Shape letters: B rows, V vocabulary, C candidates (V of them, or the k most probable ones); 1 is an
axis of length one.
"""

import jax
import jax.numpy as jnp


def sample_token(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    temperature: jax.Array,
    top_k: int | None,
    top_p: jax.Array,
) -> jax.Array:
    """int32 [B], by inverting the cumulative sum of the probabilities (one uniform a row).

    The logits are float32; for the last three see `gkdjax.types.SamplingParams`.
    """

    def greedy():
        return jnp.argmax(logits_BV, axis=-1)

    def stochastic():
        uniform_B = jax.vmap(jax.random.uniform)(keys_B)
        scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
        if top_k is None or top_k >= logits_BV.shape[-1]:
            return _invert(_probabilities(scaled_BV, top_p), uniform_B)
        # All that follows has k columns instead of V: with a top k, the nucleus costs next to
        # nothing. The candidates stand in the order in which it takes them.
        scaled_BC, ids_BC = jax.lax.top_k(scaled_BV, top_k)
        place_B = _invert(_probabilities(scaled_BC, top_p), uniform_B)
        return jnp.take_along_axis(ids_BC, place_B[:, None], axis=-1)[:, 0]

    return jax.lax.cond(temperature > 0.0, stochastic, greedy).astype(jnp.int32)


def _probabilities(scaled_BC: jax.Array, top_p: jax.Array) -> jax.Array:
    """Probabilities of the candidates; 0 outside the nucleus."""
    probs_BC = jax.nn.softmax(scaled_BC, axis=-1)
    return jax.lax.cond(top_p < 1.0, lambda: _nucleus(probs_BC, top_p), lambda: probs_BC)


def _invert(probs_BC: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index whose cumulative sum passes uniform x total; never one of probability 0."""
    # It is a sum of partial sums, whose rounding may lift it at a token of probability 0 too.
    cumulative_BC = jnp.cumsum(probs_BC, axis=-1)
    possible_BC = probs_BC > 0.0
    total_B1 = jnp.max(jnp.where(possible_BC, cumulative_BC, 0.0), axis=-1, keepdims=True)
    # Rounding may put the threshold on the total itself, past which no index lies.
    threshold_B1 = jnp.minimum(uniform_B[:, None] * total_B1, jnp.nextafter(total_B1, 0.0))
    return jnp.argmax(possible_BC & (cumulative_BC > threshold_B1), axis=-1)


def _nucleus(probs_BC: jax.Array, top_p: jax.Array) -> jax.Array:
    """The probabilities, 0 outside the nucleus (Holtzman et al. 2020, arXiv:1904.09751).

    A token belongs to it if those before it, the more probable ones and equals of lower id, do not
    reach top_p without it.
    """
    least_B1 = _least_reaching(probs_BC, top_p)
    above_BC = probs_BC > least_B1
    equal_BC = probs_BC == least_B1
    mass_above_B1 = jnp.sum(jnp.where(above_BC, probs_BC, 0.0), axis=-1, keepdims=True)
    equals_before_BC = jnp.cumsum(equal_BC, axis=-1, dtype=jnp.int32) - equal_BC
    before_BC = mass_above_B1 + equals_before_BC * least_B1
    return jnp.where(above_BC | (equal_BC & (before_BC < top_p)), probs_BC, 0.0)


def _least_reaching(probs_BC: jax.Array, top_p: jax.Array) -> jax.Array:
    """[B, 1]: the largest t such that the tokens of probability t and more reach top_p.

    Non-negative floats are in the order of their bits, so t is found bit by bit, exactly, in thirty
    sums (1.0 has no higher bit) instead of a sort of the vocabulary, which takes ten times as long.
    """
    bits_BC = jax.lax.bitcast_convert_type(probs_BC, jnp.int32)

    def try_bit(i, least_B1):
        raised_B1 = least_B1 | (1 << (29 - i))
        mass_B1 = jnp.sum(jnp.where(bits_BC >= raised_B1, probs_BC, 0.0), axis=-1, keepdims=True)
        return jnp.where(mass_B1 >= top_p, raised_B1, least_B1)

    least_B1 = jax.lax.fori_loop(0, 30, try_bit, jnp.zeros((probs_BC.shape[0], 1), jnp.int32))
    return jax.lax.bitcast_convert_type(least_B1, jnp.float32)
