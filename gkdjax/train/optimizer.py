"""The optimizer: AdamW behind a global-norm clip, with a learning-rate schedule."""

import optax

from gkdjax.config import Optim


def schedule(config: Optim, total_steps: int) -> optax.Schedule:
    """Builds the learning rate by step: linear warm-up from 0, then the configured decay."""
    warmup = round(config.warmup_ratio * total_steps)
    rest = max(total_steps - warmup, 1)
    peak = config.learning_rate
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if warmup == 0:
        return after
    # Step 0 already learns: the ramp ends, and does not begin, at its own step.
    ramp = optax.linear_schedule(peak / warmup, peak, warmup - 1 or 1)
    return optax.join_schedules([ramp, after], [warmup])


def optimizer(config: Optim, total_steps: int) -> optax.GradientTransformation:
    """Builds AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): b1 0.9, b2 0.999, eps 1e-8."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(schedule(config, total_steps), weight_decay=config.weight_decay),
    )
