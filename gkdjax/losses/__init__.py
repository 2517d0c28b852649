"""The maths of distillation, usable alone: needs jax and chex, nothing else of this package."""

# ruff: noqa: F401 (the public names)
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
