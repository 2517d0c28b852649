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
    "forward_kl": losses.topk_forward_kl,
    "reverse_kl": losses.topk_reverse_kl,
    "mixed": functools.partial(losses.topk_jsd, beta=BETA),
    "generalized_jsd": functools.partial(losses.topk_generalized_jsd, beta=BETA),
}
DENSE = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "mixed": functools.partial(losses.mixed_kl, beta=BETA),
    "generalized_jsd": functools.partial(losses.generalized_jsd, beta=BETA),
}
TAILS = ("bucket", "renormalize")


def random_logits(seed, *shape, spread=1.0):
    """(student, teacher) float32 of standard deviation `spread`, a number or an array."""
    both = np.random.default_rng(seed).normal(size=(2, *shape)) * spread
    return jnp.asarray(both[0], jnp.float32), jnp.asarray(both[1], jnp.float32)


def topk_values(student, teacher, temperature=1.0, tails=TAILS):
    """{(name, tail): value [...]}"""
    return {
        (name, tail): fn(student, teacher, tail=tail, temperature=temperature)
        for name, fn in TOPK.items()
        for tail in tails
    }


def dense_values(student, teacher, temperature=1.0):
    """{(name, "dense"): value [...]}"""
    values = {name: fn(student, teacher, temperature=temperature) for name, fn in DENSE.items()}
    return {(name, "dense"): value for name, value in values.items()}


def _with_gradients(values):
    # All gradients in one backward pass, and optimisation off: a third of the compile time.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(student, teacher):
        found, vjp = jax.vjp(lambda x: values(x, teacher), student)
        total = len(found)
        one_each = {
            key: jnp.zeros((total, *value.shape)).at[i].set(1.0)
            for i, (key, value) in enumerate(found.items())
        }
        (grads,) = jax.vmap(vjp)(one_each)
        return {key: (value, grads[i]) for i, (key, value) in enumerate(found.items())}

    return both


top_k = jax.jit(losses.top_k_logprobs, static_argnames=("k", "temperature"))
topk_compiled = jax.jit(topk_values, static_argnames=("temperature", "tails"))
dense_compiled = jax.jit(dense_values, static_argnames="temperature")
# {key: (value [...], gradient [..., V])}
topk_both = _with_gradients(topk_values)
dense_both = _with_gradients(dense_values)
