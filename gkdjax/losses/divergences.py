"""Divergences of a student q from a teacher p, a float32 value a token, in nats, unreduced.

Each exists against a teacher's top-k log-probabilities and, dense, against its logits. No gradient
is stopped here: the caller may differentiate through the teacher.

`tail` is what becomes of the mass outside the teacher's K tokens (P and Q: the masses that p and q
put on the K):

- "bucket": one more category, 1 - P against 1 - Q. A true divergence, a lower bound of the dense
  one, with a gradient on the student's mass outside K. 1 - P is the teacher's `tail_logprob`. If
  that is None it is derived from the K, where it cancels, and is floored at float32's epsilon,
  1.2e-7. A `tail_logprob` of -inf has no weight; reverse KL, which divides by it, reads it as that
  floor.
- "renormalize": both sides are renormalised over the K. It is blind outside them: a student with
  99 % of its mass elsewhere scores 0 if the other 1 % has the teacher's proportions. Only this form
  can take a top-k teacher to another temperature.

Student logits of -inf where the teacher has mass give an infinite forward KL.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax.numpy as jnp
from jax import Array

from gkdjax.losses.topk import (
    EPS,
    Categories,
    TopKLogprobs,
    check_logits,
    check_temperature,
    log_sum_exp,
    scale,
    topk_categories,
)


def topk_forward_kl(
    student_logits: Array, teacher: TopKLogprobs, *, tail: str = "bucket", temperature: float = 1.0
) -> Array:
    """KL(p || q) = sum p (log p - log q); Kullback & Leibler 1951, as in Hinton et al. 2015.

    Hinton's factor temperature**2 is not applied.

    Args:
      student_logits: floating [..., V].
      teacher: ids, logprobs [..., K] with K <= V.
      tail: "bucket" or "renormalize", see the module.
      temperature: divides the student's logits; a positive Python number. If it differs from the
        teacher's, "renormalize" takes the teacher there exactly and "bucket" raises.

    Returns:
      float32 [...]; NaN for a present id outside [0, V).

    Raises:
      ValueError: tail or temperature are none of these; shapes that do not fit.
      AssertionError: dtypes do not fit.
    """
    parts = topk_categories(student_logits, teacher, tail, temperature)
    return total(Divergence("forward_kl"), parts)


def topk_reverse_kl(
    student_logits: Array, teacher: TopKLogprobs, *, tail: str = "bucket", temperature: float = 1.0
) -> Array:
    """KL(q || p) = sum q (log q - log p); as in MiniLLM, Gu et al. 2024, arXiv:2306.08543.

    Arguments, result and errors are those of `topk_forward_kl`.
    """
    parts = topk_categories(student_logits, teacher, tail, temperature)
    return total(Divergence("reverse_kl"), parts)


def topk_jsd(
    student_logits: Array,
    teacher: TopKLogprobs,
    beta: float,
    *,
    tail: str = "bucket",
    temperature: float = 1.0,
) -> Array:
    """(1 - beta) KL(p || q) + beta KL(q || p): a Jeffreys mix and not a JSD, bakery's name for it.

    beta is a Python number in [0, 1]: 0 is `topk_forward_kl` and 1 `topk_reverse_kl`, to the bit;
    1/2 is half of Jeffreys' 1946 divergence. The rest is as in `topk_forward_kl`. For a
    Jensen-Shannon divergence take `topk_generalized_jsd`.
    """
    divergence = Divergence("mixed", beta)
    return total(divergence, topk_categories(student_logits, teacher, tail, temperature))


def topk_generalized_jsd(
    student_logits: Array,
    teacher: TopKLogprobs,
    beta: float,
    *,
    tail: str = "bucket",
    temperature: float = 1.0,
) -> Array:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    The generalized Jensen-Shannon divergence of GKD: Agarwal et al. 2024, arXiv:2306.13649. beta is
    a Python number in (0, 1). The value is at most log 2; near the ends of beta it goes to 0 as
    beta KL(p || q) and (1 - beta) KL(q || p), so the ends are errors that name the KL to use. The
    rest is as in `topk_forward_kl`.
    """
    divergence = Divergence("generalized_jsd", beta)
    return total(divergence, topk_categories(student_logits, teacher, tail, temperature))


def forward_kl(student_logits: Array, teacher_logits: Array, *, temperature: float = 1.0) -> Array:
    """KL(p || q) = sum p (log p - log q) over the whole vocabulary; see `topk_forward_kl`.

    Args:
      student_logits: floating [..., V].
      teacher_logits: the same shape. The tokens with logit -inf are one category without mass,
        whose probability is read as float32's epsilon where it is divided by.
      temperature: divides both sides' logits; a positive Python number.

    Returns:
      float32 [...].

    Raises:
      ValueError: a temperature that is not positive and finite.
      AssertionError: shapes that differ, logits that are not floating.
    """
    parts = dense_categories(student_logits, teacher_logits, temperature)
    return total(Divergence("forward_kl"), parts)


def reverse_kl(student_logits: Array, teacher_logits: Array, *, temperature: float = 1.0) -> Array:
    """KL(q || p) = sum q (log q - log p) over the whole vocabulary; the rest as `forward_kl`."""
    parts = dense_categories(student_logits, teacher_logits, temperature)
    return total(Divergence("reverse_kl"), parts)


def mixed_kl(
    student_logits: Array, teacher_logits: Array, beta: float, *, temperature: float = 1.0
) -> Array:
    """(1 - beta) KL(p || q) + beta KL(q || p), the dense `topk_jsd`; the rest as `forward_kl`."""
    divergence = Divergence("mixed", beta)
    return total(divergence, dense_categories(student_logits, teacher_logits, temperature))


def generalized_jsd(
    student_logits: Array, teacher_logits: Array, beta: float, *, temperature: float = 1.0
) -> Array:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; arXiv:2306.13649.

    The dense `topk_generalized_jsd`; the rest as `forward_kl`.
    """
    divergence = Divergence("generalized_jsd", beta)
    return total(divergence, dense_categories(student_logits, teacher_logits, temperature))


@dataclasses.dataclass(frozen=True)
class Divergence:
    """One of `DIVERGENCES` by name, with its beta; hashable.

    Raises:
      ValueError: an unknown name, or a beta that it does not take.
    """

    name: str
    beta: float = 0.0  # "mixed": weight of the reverse KL; "generalized_jsd": the teacher's share

    def __post_init__(self):
        if self.name not in DIVERGENCES:
            known = ", ".join(map(repr, DIVERGENCES))
            raise ValueError(f"divergence must be one of {known}, got {self.name!r}")
        if not isinstance(self.beta, numbers.Real):
            raise ValueError(f"beta must be a Python number, known when tracing; got {self.beta!r}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")
        if DIVERGENCES[self.name].open_beta and self.beta in (0, 1):
            raise ValueError(
                f"beta must be strictly between 0 and 1, got {self.beta}, where {self.name} is 0"
                f" for every student; use {'reverse_kl' if self.beta else 'forward_kl'} instead"
            )

    def terms(self, c: Categories) -> Array:
        return DIVERGENCES[self.name].terms(c, self.beta)


def total(divergence: Divergence, parts: tuple[Categories, ...]) -> Array:
    """Sums the terms of all categories -> [...]."""
    return sum(jnp.sum(divergence.terms(c), axis=-1) for c in parts)


def _kl(log_a: Array, log_b: Array, valid: Array) -> Array:
    """a (log a - log b) - a + b for each valid category; 0 log 0 = 0.

    "- a + b" adds up to zero over a whole distribution. With it every term is at least 0 and a
    rounding error in a normaliser enters squared: a small divergence is neither negative nor noise.
    """
    live = valid & (log_a != -jnp.inf)
    log_a = jnp.where(live, log_a, 0.0)
    a = jnp.exp(log_a)
    terms = jnp.where(live, a * (log_a - jnp.where(live, log_b, 0.0)) - a, 0.0)
    return terms + jnp.where(valid, jnp.exp(log_b), 0.0)


def _forward(c: Categories, beta: float = 0.0) -> Array:
    del beta
    return _kl(c.log_p, c.log_q, c.valid)


def _reverse(c: Categories, beta: float = 0.0) -> Array:
    del beta
    # A rest to which the teacher gives nothing would make this infinite: 0 is read as epsilon.
    return _kl(c.log_q, jnp.where(c.log_p == -jnp.inf, math.log(EPS), c.log_p), c.valid)


def _mixed(c: Categories, beta: float) -> Array:
    # Chosen while tracing: an end point is the program of its KL, to the bit.
    if beta in (0, 1):
        return _reverse(c) if beta else _forward(c)
    return (1 - beta) * _forward(c) + beta * _reverse(c)


def _generalized(c: Categories, beta: float) -> Array:
    # Two -inf have a sum of -inf and, in logaddexp, a gradient of NaN: keep them away from it.
    none = (c.log_p == -jnp.inf) & (c.log_q == -jnp.inf)
    log_p, log_q = jnp.where(none, 0.0, c.log_p), jnp.where(none, 0.0, c.log_q)
    log_m = jnp.logaddexp(math.log(beta) + log_p, math.log1p(-beta) + log_q)
    log_m = jnp.where(none, -jnp.inf, log_m)
    return beta * _kl(c.log_p, log_m, c.valid) + (1 - beta) * _kl(c.log_q, log_m, c.valid)


class _Kind(NamedTuple):
    # (categories, beta) -> [..., C]: a non-negative term a category, 0 where it is not valid. A
    # term depends on no other category's log_q: the fused heads differentiate them one by one.
    terms: Callable[[Categories, float], Array]
    dense_arrays: int  # arrays [tokens, V] that a dense fused head holds, as XLA's CPU compiles it
    open_beta: bool = False  # beta is in (0, 1) and not in [0, 1]


DIVERGENCES = {
    "forward_kl": _Kind(_forward, dense_arrays=5),
    "reverse_kl": _Kind(_reverse, dense_arrays=5),
    "mixed": _Kind(_mixed, dense_arrays=9),
    "generalized_jsd": _Kind(_generalized, dense_arrays=11, open_beta=True),
}


def dense_categories(
    student_logits: Array, teacher_logits: Array, temperature: float
) -> tuple[Categories, Categories]:
    """Compares both sides on all V tokens, and on those that the teacher masks as one more."""
    check_temperature(temperature)
    check_logits(student_logits, "student_logits")
    check_logits(teacher_logits, "teacher_logits")
    message = "student_logits against teacher_logits"
    chex.assert_equal_shape([student_logits, teacher_logits], custom_message=message)
    student_V, teacher_V = scale(student_logits, temperature), scale(teacher_logits, temperature)
    max_p_1, log_sum_p_1 = log_sum_exp(teacher_V)
    max_q_1, log_sum_q_1 = log_sum_exp(student_V)
    absent_V = teacher_V == -jnp.inf
    log_p_V, log_q_V = (teacher_V - max_p_1) - log_sum_p_1, (student_V - max_q_1) - log_sum_q_1
    rest_max_1, rest_log_sum_1 = log_sum_exp(student_V, absent_V)
    rest = Categories(
        log_p=jnp.full_like(max_p_1, -jnp.inf),
        log_q=(rest_max_1 - max_q_1) + rest_log_sum_1 - log_sum_q_1,
        valid=jnp.any(absent_V, axis=-1, keepdims=True),
    )
    return Categories(log_p_V, log_q_V, ~absent_V), rest
