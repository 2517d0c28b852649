"""One optimizer step: (state, frozen, batch, targets) -> (state, sums).

Losses are sums of weighted tokens, with weights that a row has by itself, divided by the weight of
the whole batch: accumulation and many devices therefore average as one would, exactly.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from gkdjax import lora, losses, sharding
from gkdjax.config import Config, Gkd, anchor_sets
from gkdjax.models.decoder import Decoder, unembedding_table
from gkdjax.types import Batch, DenseTargets, TeacherTargets, TrainState

Part = tuple[Batch, TeacherTargets]


def init_state(trainable, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def student_params(frozen: dict | None, trainable, dropout_rng: jax.Array | None = None) -> dict:
    """Parameters for `decoder.apply`: adapters on their frozen base, or all of them trained."""
    return trainable if frozen is None else lora.attach(frozen, trainable, dropout_rng)


def weighted_divergence(
    hidden_BND: jax.Array,
    unembedding_VD: jax.Array,
    softcap: float | None,
    targets: TeacherTargets,
    weights_BN: jax.Array,
    divergence: str,
    gkd: Gkd,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """The student's divergence from dense or top-k targets -> (weighted sum, per token [B,N]).

    Fused from hidden states, see `gkdjax.losses.fused`; the mesh's devices share the rows.

    Models are compared on the ids v < S that both have: those below `targets.shared`, or all rows
    of the smaller table. The student is q_v = exp(z_v) / sum_{u < S} exp(z_u), whatever the teacher
    is; rows that are no token of both are on neither side. A dense teacher is p_v so, too. A top-k
    teacher keeps p_v under its whole vocabulary: its K are those below S, and its tail 1 - P holds
    what it gives to tokens that the student lacks, see `losses.within`. Where it has no such tokens
    K = S is the dense case.
    """
    options = {
        "divergence": divergence,
        "beta": gkd.jsd_beta,
        "temperature": gkd.temperature,
        "softcap": softcap,
        "chunk_size": gkd.chunk_size,
        **sharding.head_axes(mesh),
    }
    if isinstance(targets, DenseTargets):
        shared = shared_ids(unembedding_VD, targets)
        return losses.fused_dense_divergence(
            hidden_BND,
            unembedding_VD[:shared],
            targets.hidden_BNE,
            targets.unembedding_VE[:shared],
            weights_BN,
            teacher_softcap=targets.softcap,
            **options,
        )
    return losses.fused_topk_divergence(
        hidden_BND,
        unembedding_VD[: targets.shared],
        losses.within(targets.topk, targets.shared),
        weights_BN,
        tail=gkd.tail,
        **options,
    )


def shared_ids(unembedding_VD: jax.Array, targets: DenseTargets) -> int:
    """How many ids of the student's table and of a dense teacher's are compared."""
    rows = unembedding_VD.shape[0], targets.unembedding_VE.shape[0]
    return min(rows if targets.shared is None else (*rows, targets.shared))


def token_weights(mask_BN: jax.Array, reduction: str) -> jax.Array:
    """What each target counts: `gkd.reduction`."""
    return mask_BN if reduction == "token" else losses.example_weights(mask_BN)


def make_train_step(
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    config: Config,
    mesh: Mesh,
) -> Callable:
    """Builds the jitted step.

    Returns:
      step(state, frozen, batch, targets, anchors, *, divergence) -> (state, sums). `state` is
      donated; `frozen` is the base's parameters, or None when all are trained; `anchors` are
      (batch, targets) pairs by the names of `config.anchor_sets`. The sums are float32 scalars:
      `loss_sum` and `loss_weight`, whose quotient is the loss, and so `<name>_sum` and
      `<name>_weight` of each anchor; the number of `targets`, `grad_norm` and `learning_rate`.
    """
    accumulation, gkd, anchor_config = config.train.accumulation, config.gkd, config.anchor
    factors = {each.name: each.weight for each in anchor_sets(anchor_config)} | {"loss": 1.0}
    spec, whole = decoder.spec, NamedSharding(mesh, sharding.WHOLE)
    layout = dataclasses.replace(decoder.layout, mesh=mesh)
    seed_key = jax.random.key(config.train.seed)

    def part_loss(params, part: Part, divergence: str) -> jax.Array:
        batch, targets = part
        hidden_BSD = decoder.apply(
            {"params": params}, batch.student_tokens_BS, batch.student_mask_BS
        )
        hidden_BND = jnp.take_along_axis(hidden_BSD, batch.student_at_BN[:, :, None], axis=1)
        summed, _ = weighted_divergence(
            hidden_BND,
            unembedding_table(spec, params),
            spec.final_softcap,
            targets,
            token_weights(batch.target_mask_BN, gkd.reduction),
            divergence,
            gkd,
            mesh,
        )
        return summed

    def step(state: TrainState, frozen, batch, targets, anchors, *, divergence: str):
        parts = {"loss": (batch, targets)} | anchors
        kinds = dict.fromkeys(parts, anchor_config.divergence) | {"loss": divergence}
        weight = {
            name: losses.masked_count(token_weights(of.target_mask_BN, gkd.reduction))
            for name, (of, _) in parts.items()
        }
        step_key = jax.random.fold_in(seed_key, state.step)

        def objective(trainable, micro):
            params = student_params(frozen, trainable, jax.random.fold_in(step_key, micro))
            total, sums = 0.0, {}
            for name, part in parts.items():
                rows = _micro_batch(part, micro, accumulation)
                sums[name] = part_loss(params, rows, kinds[name])
                total += sums[name] * (factors[name] / weight[name])
            return total, sums

        def add_micro_batch(carry, micro):
            gradient = jax.grad(objective, has_aux=True)(state.trainable, micro)
            added = jax.tree.map(jnp.add, carry, gradient)
            return jax.lax.with_sharding_constraint(added, carried), None

        nothing = jax.tree.map(jnp.zeros_like, state.trainable), dict.fromkeys(parts, 0.0)
        carried = layout.places(state.trainable), dict.fromkeys(parts, whole)
        (grads, totals), _ = jax.lax.scan(add_micro_batch, nothing, jnp.arange(accumulation))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        sums = {
            "targets": losses.masked_count(batch.target_mask_BN),
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
        }
        for name in parts:
            sums |= {f"{name}_sum": totals[name], f"{name}_weight": weight[name]}
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, opt_state), sums

    def placed_step(state: TrainState, *args, **kwargs):
        state, sums = step(state, *args, **kwargs)
        places = layout.places(state), dict.fromkeys(sums, whole)
        return jax.lax.with_sharding_constraint((state, sums), places)

    return jax.jit(placed_step, donate_argnums=0, static_argnames="divergence")


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
