"""How near a student is to a teacher, token by token, in the measures that people compare.

All are float32 [...], at the temperature given; p is the teacher, q the student.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gkdjax.losses.divergences import Divergence, dense_categories, total
from gkdjax.losses.topk import Categories, TopKLogprobs, top_k_logprobs, topk_categories


class Agreement(NamedTuple):
    """One number a token each, or their means over tokens."""

    forward_kl: jax.Array  # KL(p || q), nats
    reverse_kl: jax.Array  # KL(q || p), nats
    teacher_top_k_mass: jax.Array  # what p puts on its K best tokens
    student_top_k_mass: jax.Array  # what q puts on those same tokens
    top1_agreement: jax.Array  # 1 where both have the same most probable token, else 0
    acceptance_rate: jax.Array  # sum of min(p, q): Leviathan et al. 2023, arXiv:2211.17192


def dense_agreement(
    student_logits: jax.Array, teacher_logits: jax.Array, k: int, *, temperature: float = 1.0
) -> Agreement:
    """Over the whole vocabulary.

    Args:
      student_logits: floating [..., V].
      teacher_logits: the same shape.
      k: of the two masses, 1 to V.
      temperature: divides both sides' logits.

    Raises:
      ValueError: k or temperature out of range.
      AssertionError: shapes that differ, logits that are not floating.
    """
    parts = dense_categories(student_logits, teacher_logits, temperature)
    teacher = top_k_logprobs(teacher_logits, k, temperature)
    inside, _ = topk_categories(student_logits, teacher, "bucket", temperature)
    return _agreement(parts, inside, teacher.ids, student_logits)


def topk_agreement(
    student_logits: jax.Array,
    teacher: TopKLogprobs,
    *,
    tail: str = "bucket",
    temperature: float = 1.0,
) -> Agreement:
    """From a teacher's K best tokens: divergences as `topk_forward_kl` has them, with its errors.

    With "bucket" the acceptance rate takes all tokens outside the K as one, so it is an upper
    bound. With "renormalize" both masses are 1 by definition.
    """
    parts = topk_categories(student_logits, teacher, tail, temperature)
    return _agreement(parts, parts[0], teacher.ids, student_logits)


def _agreement(
    parts: tuple[Categories, ...], inside: Categories, ids_K: jax.Array, student_logits: jax.Array
) -> Agreement:
    best = jnp.argmax(student_logits, axis=-1)
    return Agreement(
        forward_kl=total(Divergence("forward_kl"), parts),
        reverse_kl=total(Divergence("reverse_kl"), parts),
        teacher_top_k_mass=_mass(inside.log_p, inside.valid),
        student_top_k_mass=_mass(inside.log_q, inside.valid),
        top1_agreement=(best == ids_K[..., 0]).astype(jnp.float32),
        acceptance_rate=sum(_mass(jnp.minimum(c.log_p, c.log_q), c.valid) for c in parts),
    )


def _mass(logprobs: jax.Array, valid: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(valid, jnp.exp(logprobs), 0.0), axis=-1)
