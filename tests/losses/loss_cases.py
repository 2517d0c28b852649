"""The eight divergences by name, with one beta, and random logits for them.

Everything is computed in few compiled calls: compiling is what these tests spend their time on.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gkdjax import losses
from tests.losses.numpy_reference import BETA

TOPK = {
    "forward": losses.topk_forward_kl,
    "reverse": losses.topk_reverse_kl,
    "mixed": functools.partial(losses.topk_jsd, beta=BETA),
    "generalized": functools.partial(losses.topk_generalized_jsd, beta=BETA),
}
DENSE = {
    "forward": losses.forward_kl,
    "reverse": losses.reverse_kl,
    "mixed": functools.partial(losses.mixed_kl, beta=BETA),
    "generalized": functools.partial(losses.generalized_jsd, beta=BETA),
}
NAMES = tuple(TOPK)
TAILS = ("bucket", "renormalize")


def random_logits(seed, *shape, spread=1.0):
    """(student, teacher) float32 of standard deviation `spread`, a number or an array."""
    rng = np.random.default_rng(seed)
    draw = rng.normal(size=(2, *shape)) * spread
    return jnp.asarray(draw[0], jnp.float32), jnp.asarray(draw[1], jnp.float32)


def topk_values(student, teacher, temperature=1.0, tails=TAILS):
    """{(name, tail): value [...]}"""
    return {
        (name, tail): fn(student, teacher, tail=tail, temperature=temperature)
        for name, fn in TOPK.items()
        for tail in tails
    }


def dense_values(student, teacher, temperature=1.0):
    """{name: value [...]}"""
    return {name: fn(student, teacher, temperature=temperature) for name, fn in DENSE.items()}


def _with_gradients(values):
    @functools.partial(jax.jit, static_argnames=("temperature", "tails"))
    def both(student, teacher, **kwargs):
        fn = functools.partial(values, teacher=teacher, **kwargs)
        found, vjp = jax.vjp(lambda x: fn(x), student)
        zeros = jax.tree.map(jnp.zeros_like, found)
        ones = {key: {**zeros, key: jnp.ones_like(found[key])} for key in found}
        return {key: (found[key], vjp(ones[key])[0]) for key in found}

    return both


# {key: (value [...], gradient [..., V])}, compiled once for every shape.
topk_both = _with_gradients(topk_values)
dense_both = _with_gradients(dense_values)
