"""One optimizer step: (state, frozen, batch, targets) -> (state, sums).

Losses are sums of weighted tokens, with weights that are fixed before the batch is cut into parts:
accumulation and many devices therefore average per token, exactly.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gkdjax import lora, losses
from gkdjax.config import Config, Gkd
from gkdjax.models.decoder import Decoder, unembed
from gkdjax.types import Batch, DenseTargets, TeacherTargets, TrainState

Part = tuple[Batch, TeacherTargets]


def init_state(trainable, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def student_params(frozen: dict | None, trainable, dropout_rng: jax.Array | None = None) -> dict:
    """Parameters for `decoder.apply`: adapters on their frozen base, or all of them trained."""
    return trainable if frozen is None else lora.attach(frozen, trainable, dropout_rng)


def token_divergence(
    student_logits_BNV: jax.Array, targets: TeacherTargets, divergence: str, gkd: Gkd
) -> jax.Array:
    """The divergence of each target, float32 [B,N] in nats, against dense or top-k targets.

    Vocabularies padded to different sizes are compared on the ids that both have.
    """
    if isinstance(targets, DenseTargets):
        function = {
            "forward_kl": losses.forward_kl,
            "reverse_kl": losses.reverse_kl,
            "mixed": losses.mixed_kl,
            "generalized_jsd": losses.generalized_jsd,
        }[divergence]
        teacher = teacher_logits(targets)
        shared = min(teacher.shape[-1], student_logits_BNV.shape[-1])
        sides, options = (student_logits_BNV[..., :shared], teacher[..., :shared]), {}
    else:
        function = {
            "forward_kl": losses.topk_forward_kl,
            "reverse_kl": losses.topk_reverse_kl,
            "mixed": losses.topk_jsd,
            "generalized_jsd": losses.topk_generalized_jsd,
        }[divergence]
        sides, options = (student_logits_BNV, targets.topk), {"tail": gkd.tail}
    beta = (gkd.jsd_beta,) if divergence in ("mixed", "generalized_jsd") else ()
    return function(*sides, *beta, temperature=gkd.temperature, **options)


def teacher_logits(targets: DenseTargets) -> jax.Array:
    """float32 [B,N,V] of dense targets."""
    return unembed(targets.hidden_BNE, targets.unembedding_VE, targets.softcap)


def make_train_step(
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    config: Config,
    mesh: Mesh,
) -> Callable:
    """Builds the jitted step.

    Returns:
      step(state, frozen, batch, targets, anchor, *, divergence) -> (state, sums). `state` is
      donated; `frozen` is the base's parameters, or None when all are trained; `anchor` is a
      (batch, targets) pair or None. The sums are float32 scalars: `loss_sum` over `targets` main
      tokens, `anchor_sum` over `anchor_targets`, and the step's `grad_norm` and `learning_rate`.
    """
    accumulation, gkd, anchor_config = config.train.accumulation, config.gkd, config.anchor
    seed_key = jax.random.key(config.train.seed)

    def part_loss(params, part: Part, divergence: str) -> jax.Array:
        batch, targets = part
        variables = {"params": params}
        hidden_BSD = decoder.apply(variables, batch.student_tokens_BS, batch.student_mask_BS)
        hidden_BND = jnp.take_along_axis(hidden_BSD, batch.student_at_BN[:, :, None], axis=1)
        logits_BNV = decoder.apply(variables, hidden_BND, method="unembed")
        targets = _blank_where_masked(targets, batch.target_mask_BN)
        loss_BN = token_divergence(logits_BNV, targets, divergence, gkd)
        return losses.masked_sum(loss_BN, batch.target_mask_BN)

    def step(state: TrainState, frozen, batch, targets, anchor, *, divergence: str):
        parts = {"main": (batch, targets)} | ({} if anchor is None else {"anchor": anchor})
        kinds = {"main": divergence, "anchor": anchor_config.divergence}
        counts = {name: losses.masked_count(part[0].target_mask_BN) for name, part in parts.items()}
        weights = {"main": 1.0, "anchor": anchor_config.weight}
        step_key = jax.random.fold_in(seed_key, state.step)

        def objective(trainable, micro):
            params = student_params(frozen, trainable, jax.random.fold_in(step_key, micro))
            total, sums = 0.0, {}
            for name, part in parts.items():
                rows = _micro_batch(part, micro, accumulation)
                sums[name] = part_loss(params, rows, kinds[name])
                total += sums[name] * (weights[name] / counts[name])
            return total, sums

        def add_micro_batch(carry, micro):
            gradient = jax.grad(objective, has_aux=True)(state.trainable, micro)
            return jax.tree.map(jnp.add, carry, gradient), None

        (grads, totals), _ = jax.lax.scan(
            add_micro_batch,
            (jax.tree.map(jnp.zeros_like, state.trainable), dict.fromkeys(parts, 0.0)),
            jnp.arange(accumulation),
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        sums = {
            "loss_sum": totals["main"],
            "targets": counts["main"],
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
        }
        if anchor is not None:
            sums |= {"anchor_sum": totals["anchor"], "anchor_targets": counts["anchor"]}
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, opt_state), sums

    return jax.jit(
        step,
        donate_argnames="state",
        static_argnames="divergence",
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def _blank_where_masked(targets: TeacherTargets, mask_BN: jax.Array) -> TeacherTargets:
    """A teacher may leave anything where there is no target: a NaN would pass into the gradient."""
    mask_BN1 = mask_BN[:, :, None]
    if isinstance(targets, DenseTargets):
        hidden_BNE = jnp.where(mask_BN1, targets.hidden_BNE, 0.0)
        return dataclasses.replace(targets, hidden_BNE=hidden_BNE)
    topk = targets.topk
    tail = topk.tail_logprob
    blank = dataclasses.replace(
        topk,
        logprobs=jnp.where(mask_BN1, topk.logprobs, -jnp.inf),
        tail_logprob=None if tail is None else jnp.where(mask_BN, tail, 0.0),
    )
    return dataclasses.replace(targets, topk=blank)


def _micro_batch(part: Part, micro: jax.Array, accumulation: int) -> Part:
    """Every `accumulation`-th row from `micro` on: so each device keeps its share of the rows."""

    def take(x):
        x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(x, micro, axis=1, keepdims=False)

    batch, targets = part
    if isinstance(targets, DenseTargets):  # its unembedding has no rows
        return jax.tree.map(take, batch), dataclasses.replace(
            targets, hidden_BNE=take(targets.hidden_BNE)
        )
    return jax.tree.map(take, batch), jax.tree.map(take, targets)
