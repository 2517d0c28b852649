"""How near a student q is to a teacher p: float32 [...], a value a token, at a temperature."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from gkdjax.losses.divergences import Divergence, dense_categories, total
from gkdjax.losses.topk import Categories, TopKLogprobs, top_k_logprobs, topk_categories


class Agreement(NamedTuple):
    """A value a token of each measure, or its mean over tokens."""

    forward_kl: Array  # KL(p || q), nats
    reverse_kl: Array  # KL(q || p), nats
    teacher_top_k_mass: Array  # p's mass on its K best tokens
    student_top_k_mass: Array  # q's mass on the same tokens
    top1_agreement: Array  # 1 if p and q have the same most probable token, else 0
    acceptance_rate: Array  # sum of min(p, q): Leviathan et al. 2023, arXiv:2211.17192


def dense_agreement(
    student_logits: Array, teacher_logits: Array, k: int, *, temperature: float = 1.0
) -> Agreement:
    """Compares over the whole vocabulary; k (1 to V) is that of the two masses.

    The other arguments and errors are those of `forward_kl`.
    """
    parts = dense_categories(student_logits, teacher_logits, temperature)
    teacher = top_k_logprobs(teacher_logits, k, temperature)
    inside, _ = topk_categories(student_logits, teacher, "bucket", temperature)
    return _agreement(parts, inside, teacher.ids, student_logits)


def topk_agreement(
    student_logits: Array, teacher: TopKLogprobs, *, tail: str = "bucket", temperature: float = 1.0
) -> Agreement:
    """Compares on the teacher's K best tokens; arguments and errors as in `topk_forward_kl`.

    With "bucket" the tokens outside the K count as one, so the acceptance rate is an upper bound.
    With "renormalize" both masses are 1 by definition.
    """
    parts = topk_categories(student_logits, teacher, tail, temperature)
    return _agreement(parts, parts[0], teacher.ids, student_logits)


def _agreement(
    parts: tuple[Categories, ...], inside: Categories, ids_K: Array, student_logits: Array
) -> Agreement:
    def mass(logprobs, valid):
        return jnp.sum(jnp.where(valid, jnp.exp(logprobs), 0.0), axis=-1)

    best = jnp.argmax(student_logits, axis=-1)
    return Agreement(
        forward_kl=total(Divergence("forward_kl"), parts),
        reverse_kl=total(Divergence("reverse_kl"), parts),
        teacher_top_k_mass=mass(inside.log_p, inside.valid),
        student_top_k_mass=mass(inside.log_q, inside.valid),
        top1_agreement=(best == ids_K[..., 0]).astype(jnp.float32),
        acceptance_rate=sum(mass(jnp.minimum(c.log_p, c.log_q), c.valid) for c in parts),
    )
