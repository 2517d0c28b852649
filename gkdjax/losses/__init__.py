"""The maths of distillation, usable alone: needs jax and chex, nothing else of this package.

from gkdjax.losses import masked_mean, top_k_logprobs, topk_forward_kl

teacher = top_k_logprobs(teacher_logits, k=64)
loss = masked_mean(topk_forward_kl(student_logits, teacher), mask)
"""

from gkdjax.losses.agreement import Agreement, dense_agreement, topk_agreement
from gkdjax.losses.divergences import (
    forward_kl,
    generalized_jsd,
    mixed_kl,
    reverse_kl,
    topk_forward_kl,
    topk_generalized_jsd,
    topk_jsd,
    topk_reverse_kl,
)
from gkdjax.losses.fused import fused_dense_divergence, fused_top_k, fused_topk_divergence
from gkdjax.losses.masking import example_weights, masked_count, masked_mean, masked_sum
from gkdjax.losses.topk import TopKLogprobs, top_k_logprobs, within

__all__ = [
    "Agreement",
    "TopKLogprobs",
    "dense_agreement",
    "example_weights",
    "forward_kl",
    "fused_dense_divergence",
    "fused_top_k",
    "fused_topk_divergence",
    "generalized_jsd",
    "masked_count",
    "masked_mean",
    "masked_sum",
    "mixed_kl",
    "reverse_kl",
    "top_k_logprobs",
    "topk_agreement",
    "topk_forward_kl",
    "topk_generalized_jsd",
    "topk_jsd",
    "topk_reverse_kl",
    "within",
]
