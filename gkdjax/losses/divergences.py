"""Divergences between a teacher p and a student q: per token, unreduced, float32, in nats.

Each exists twice, with one core: against a teacher's top-k log-probabilities, and dense, against
its logits. No gradient is stopped here; a caller that differentiates through the teacher gets that
gradient.

What `tail` does with the mass outside the teacher's K tokens (P and Q: what p and q put on the K):

- "bucket": one more category, 1 - P against 1 - Q. A true divergence, a lower bound of the dense
  one, and the student's mass outside the K has a gradient. The teacher's 1 - P is `tail_logprob`
  where it is given; otherwise it is derived from the K, where it cancels in float32, and is floored
  at float32's epsilon, 1.2e-7. A given -inf means exactly nothing: it has no weight, and where it
  is divided by (reverse KL) it is read as that floor.
- "renormalize": both sides are renormalised over the K. Blind outside them: a student with 99 % of
  its mass elsewhere scores 0 if the other 1 % has the teacher's proportions. It is the only form in
  which a truncated teacher can be taken to another temperature.

Student logits of -inf where the teacher has mass give an infinite forward KL, as they should.
"""

import math
import numbers
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

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

DIVERGENCES = ("forward_kl", "reverse_kl", "mixed", "generalized_jsd")


def topk_forward_kl(
    student_logits: jax.Array,
    teacher: TopKLogprobs,
    *,
    tail: str = "bucket",
    temperature: float = 1.0,
) -> jax.Array:
    """KL(p || q) = sum p (log p - log q); Kullback & Leibler 1951, as in Hinton et al. 2015.

    Hinton's factor temperature**2 is not applied.

    Args:
      student_logits: floating [..., V].
      teacher: ids, logprobs [..., K] with K <= V; absent entries (-inf) count for nothing.
      tail: "bucket" or "renormalize", see the module.
      temperature: divides the student's logits; positive, static. Where it differs from the
        teacher's, "renormalize" takes the teacher there exactly and "bucket" refuses.

    Returns:
      float32 [...], nats, one a token. An id outside [0, V) that is not absent gives NaN.

    Raises:
      ValueError: an unknown tail; a temperature that is not positive and finite, or that "bucket"
        cannot reach; leading axes that differ; K > V.
      AssertionError: ranks, dtypes or the teacher's own shapes do not fit.
    """
    return _topk(Divergence("forward_kl"), student_logits, teacher, tail, temperature)


def topk_reverse_kl(
    student_logits: jax.Array,
    teacher: TopKLogprobs,
    *,
    tail: str = "bucket",
    temperature: float = 1.0,
) -> jax.Array:
    """KL(q || p) = sum q (log q - log p); as in MiniLLM, Gu et al. 2024, arXiv:2306.08543.

    Arguments, result and errors: those of `topk_forward_kl`.
    """
    return _topk(Divergence("reverse_kl"), student_logits, teacher, tail, temperature)


def topk_jsd(
    student_logits: jax.Array,
    teacher: TopKLogprobs,
    beta: float,
    *,
    tail: str = "bucket",
    temperature: float = 1.0,
) -> jax.Array:
    """(1 - beta) KL(p || q) + beta KL(q || p): a Jeffreys-type mix, not a JSD whatever its name.

    The name is the one that users of bakery know; for a Jensen-Shannon divergence take
    `topk_generalized_jsd`. beta=1/2 is half of Jeffreys' 1946 divergence.

    Args:
      student_logits: floating [..., V].
      teacher: ids, logprobs [..., K].
      beta: in [0, 1], a Python number. 0 is `topk_forward_kl` and 1 `topk_reverse_kl`, to the bit.
      tail: as in `topk_forward_kl`.
      temperature: as in `topk_forward_kl`.

    Returns:
      float32 [...], nats, one a token.

    Raises:
      ValueError: beta outside [0, 1]; and what `topk_forward_kl` raises.
    """
    _check_beta(beta)
    return _topk(Divergence("mixed", beta), student_logits, teacher, tail, temperature)


def topk_generalized_jsd(
    student_logits: jax.Array,
    teacher: TopKLogprobs,
    beta: float,
    *,
    tail: str = "bucket",
    temperature: float = 1.0,
) -> jax.Array:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    The generalized Jensen-Shannon divergence of GKD: Agarwal et al. 2024, arXiv:2306.13649. It is
    at most log 2 and goes to 0 at both ends of beta, as beta KL(p || q) and (1 - beta) KL(q || p);
    so the ends are errors that name the divergence to use.

    Args:
      student_logits: floating [..., V].
      teacher: ids, logprobs [..., K].
      beta: in (0, 1), a Python number: the teacher's share of m.
      tail: as in `topk_forward_kl`.
      temperature: as in `topk_forward_kl`.

    Returns:
      float32 [...], nats, one a token.

    Raises:
      ValueError: beta outside (0, 1); and what `topk_forward_kl` raises.
    """
    _check_open_beta(beta, at_zero="topk_forward_kl", at_one="topk_reverse_kl")
    return _topk(Divergence("generalized_jsd", beta), student_logits, teacher, tail, temperature)


def forward_kl(
    student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """KL(p || q) = sum p (log p - log q) over the whole vocabulary; see `topk_forward_kl`.

    Args:
      student_logits: floating [..., V].
      teacher_logits: same shape; tokens with logit -inf have no mass and are taken together as one
        category, whose probability is read as float32's epsilon where it is divided by.
      temperature: divides both sides' logits; positive, static.

    Returns:
      float32 [...], nats, one a token.

    Raises:
      ValueError: a temperature that is not positive and finite.
      AssertionError: shapes that differ, logits that are not floating.
    """
    return _dense(Divergence("forward_kl"), student_logits, teacher_logits, temperature)


def reverse_kl(
    student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """KL(q || p) = sum q (log q - log p) over the whole vocabulary; the rest as `forward_kl`."""
    return _dense(Divergence("reverse_kl"), student_logits, teacher_logits, temperature)


def mixed_kl(
    student_logits: jax.Array, teacher_logits: jax.Array, beta: float, *, temperature: float = 1.0
) -> jax.Array:
    """(1 - beta) KL(p || q) + beta KL(q || p), the dense `topk_jsd`; arguments as in `forward_kl`.

    Raises:
      ValueError: beta outside [0, 1]; and what `forward_kl` raises.
    """
    _check_beta(beta)
    return _dense(Divergence("mixed", beta), student_logits, teacher_logits, temperature)


def generalized_jsd(
    student_logits: jax.Array, teacher_logits: jax.Array, beta: float, *, temperature: float = 1.0
) -> jax.Array:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; arXiv:2306.13649.

    The dense `topk_generalized_jsd`; arguments as in `forward_kl`.

    Raises:
      ValueError: beta outside (0, 1); and what `forward_kl` raises.
    """
    _check_open_beta(beta, at_zero="forward_kl", at_one="reverse_kl")
    return _dense(Divergence("generalized_jsd", beta), student_logits, teacher_logits, temperature)


class Divergence(NamedTuple):
    """One of the four by name, with its beta: hashable, to be chosen while tracing."""

    name: str  # of DIVERGENCES
    beta: float = 0.0  # "mixed": weight of the reverse KL; "generalized_jsd": the teacher's share

    def terms(self, c: Categories) -> jax.Array:
        """[..., C], one non-negative term a category, 0 where there is none; they sum to it.

        Each depends on its own log_q alone: fused heads differentiate them one by one.
        """
        if self.name == "forward_kl":
            return _forward(c)
        if self.name == "reverse_kl":
            return _reverse(c)
        if self.name == "mixed":
            return _mixed(c, self.beta)
        return _generalized(c, self.beta)

    def check(self) -> None:
        """Raises ValueError for an unknown name or a beta that it does not take."""
        if self.name not in DIVERGENCES:
            known = ", ".join(map(repr, DIVERGENCES))
            raise ValueError(f"divergence must be one of {known}, got {self.name!r}")
        if self.name == "mixed":
            _check_beta(self.beta)
        if self.name == "generalized_jsd":
            _check_open_beta(self.beta, at_zero="forward_kl", at_one="reverse_kl")


def total(divergence: Divergence, parts: tuple[Categories, ...]) -> jax.Array:
    """[...], the divergence over all categories."""
    return sum(jnp.sum(divergence.terms(c), axis=-1) for c in parts)


def _forward(c: Categories) -> jax.Array:
    return _kl(c.log_p, c.log_q, c.valid)


def _reverse(c: Categories) -> jax.Array:
    # A teacher that gives the rest nothing at all would make this infinite: read 0 as epsilon.
    return _kl(c.log_q, jnp.where(c.log_p == -jnp.inf, math.log(EPS), c.log_p), c.valid)


def _mixed(c: Categories, beta: float) -> jax.Array:
    # Chosen while tracing, so that an end point is the very program of its KL, to the bit.
    if beta == 0:
        return _forward(c)
    if beta == 1:
        return _reverse(c)
    return (1 - beta) * _forward(c) + beta * _reverse(c)


def _generalized(c: Categories, beta: float) -> jax.Array:
    log_m = _log_mixture(c.log_p, c.log_q, beta)
    return beta * _kl(c.log_p, log_m, c.valid) + (1 - beta) * _kl(c.log_q, log_m, c.valid)


def _topk(divergence, student_logits, teacher, tail, temperature) -> jax.Array:
    return total(divergence, topk_categories(student_logits, teacher, tail, temperature))


def _dense(divergence, student_logits, teacher_logits, temperature) -> jax.Array:
    return total(divergence, dense_categories(student_logits, teacher_logits, temperature))


def _log_mixture(log_p: jax.Array, log_q: jax.Array, beta: float) -> jax.Array:
    # Two -inf have a sum of -inf and, in logaddexp, a gradient of NaN: keep them away from it.
    none = (log_p == -jnp.inf) & (log_q == -jnp.inf)
    log_p, log_q = jnp.where(none, 0.0, log_p), jnp.where(none, 0.0, log_q)
    log_m = jnp.logaddexp(math.log(beta) + log_p, math.log1p(-beta) + log_q)
    return jnp.where(none, -jnp.inf, log_m)


def _kl(log_a: jax.Array, log_b: jax.Array, valid: jax.Array) -> jax.Array:
    """a (log a - log b) - a + b for each valid category; 0 log 0 = 0.

    "- a + b" adds up to zero over a whole distribution. With it every term is at least 0 and a
    rounding error in a normaliser enters squared, so that a small divergence is neither negative
    nor noise.
    """
    live = valid & (log_a != -jnp.inf)
    log_a = jnp.where(live, log_a, 0.0)
    a = jnp.exp(log_a)
    terms = jnp.where(live, a * (log_a - jnp.where(live, log_b, 0.0)) - a, 0.0)
    return terms + jnp.where(valid, jnp.exp(log_b), 0.0)


def dense_categories(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: float
) -> tuple[Categories, Categories]:
    check_temperature(temperature)
    check_logits(student_logits, "student_logits")
    check_logits(teacher_logits, "teacher_logits")
    chex.assert_equal_shape(
        [student_logits, teacher_logits], custom_message="student_logits against teacher_logits"
    )
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


def _check_beta(beta: float) -> None:
    if not isinstance(beta, numbers.Real):
        raise ValueError(f"beta must be a Python number, known when tracing; got {beta!r}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")


def _check_open_beta(beta: float, *, at_zero: str, at_one: str) -> None:
    _check_beta(beta)
    if beta in (0, 1):
        raise ValueError(
            f"beta must be strictly between 0 and 1, got {beta}, where this divergence is 0 for "
            f"every student; use {at_one if beta else at_zero} instead"
        )
