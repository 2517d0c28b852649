"""One optimizer step: (state, frozen, batch, targets) -> (state, sums).

Losses are sums of weighted tokens, with weights that each row has by itself, divided by the weight
of the whole batch: so accumulation and many devices average exactly as one would.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from gkdjax.config import Config, anchor_sets
from gkdjax.losses.masking import masked_count
from gkdjax.losses.objective import DenseTargets, TeacherTargets, token_weights, weighted_divergence
from gkdjax.models.decoder import Decoder, unembedding_table
from gkdjax.models.lora import student_params
from gkdjax.parallel.mesh import WHOLE, fetch, head_axes, shard_rows
from gkdjax.types import Batch, TrainState

Part = tuple[Batch, TeacherTargets]


class TrainBatch(NamedTuple):
    """All that a step computes with, on the devices, and how the batch came about."""

    batch: Batch
    targets: TeacherTargets
    anchors: dict[str, Part]  # by name
    divergence: str
    names: dict[str, list[str]]  # of the rows of the batch ("loss") and of each anchor
    host: Batch  # the batch in NumPy
    on_policy: dict[str, int]  # counts of rows that the student wrote

    def counts(self) -> dict[str, int]:
        """Counts for metrics.jsonl; `batch_crc32` shows where the data of two runs part."""
        crc32 = 0
        for leaf in jax.tree.leaves(self.host):
            crc32 = zlib.crc32(np.ascontiguousarray(leaf), crc32)
        tokens = int(self.host.student_mask_BS.sum())
        return self.on_policy | {"tokens": tokens, "batch_crc32": crc32}

    def on_host(self) -> "TrainBatch":
        """Fetches the arrays; a teacher's unembedding stays where it is, on the devices."""
        return self._with(fetch, lambda dense: _with_hidden(dense, fetch))

    def on_devices(self, mesh: Mesh) -> "TrainBatch":
        """Undoes `on_host`."""
        place = functools.partial(shard_rows, mesh)
        return self._with(place, lambda dense: _with_hidden(dense, place))

    def without_dense(self) -> "TrainBatch":
        """Lets go of dense targets, which are large."""
        return self._with(lambda rows: rows, lambda dense: None)

    def _with(self, change: Callable, change_dense: Callable) -> "TrainBatch":
        def part(batch: Batch, targets: TeacherTargets) -> Part:
            dense = isinstance(targets, DenseTargets)
            return change(batch), (change_dense if dense else change)(targets)

        batch, targets = part(self.batch, self.targets)
        anchors = {name: part(*each) for name, each in self.anchors.items()}
        return self._replace(batch=batch, targets=targets, anchors=anchors)


def _with_hidden(dense: DenseTargets, change: Callable) -> DenseTargets:
    return dataclasses.replace(dense, hidden_BNE=change(dense.hidden_BNE))


def init_state(trainable, optimizer: optax.GradientTransformation) -> TrainState:
    """Makes the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


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
      `<name>_weight` of each anchor; the number of `targets`, `grad_norm`, `update_rms` (the root
      mean square of the update's numbers), `learning_rate`, and `good`: 0 where a loss or the
      gradient is not finite. Such a step counts, and changes neither parameters nor optimizer.
    """
    micro_batches, replicated = config.train.grad_accum_steps, NamedSharding(mesh, WHOLE)
    layout = dataclasses.replace(decoder.layout, mesh=mesh)
    seed_key = jax.random.key(config.train.seed)
    objective_of = _objective(decoder, config, mesh)

    def step(state: TrainState, frozen, batch, targets, anchors, *, divergence: str):
        parts, weight, objective = objective_of(batch, targets, anchors, divergence)
        step_key = jax.random.fold_in(seed_key, state.step)

        def loss(trainable, micro):
            key = jax.random.fold_in(step_key, micro)
            return objective(student_params(frozen, trainable, key), micro)

        def add_micro_batch(carry, micro):
            gradient = jax.grad(loss, has_aux=True)(state.trainable, micro)
            added = jax.tree.map(jnp.add, carry, gradient)
            return jax.lax.with_sharding_constraint(added, carried), None

        nothing = jax.tree.map(jnp.zeros_like, state.trainable), dict.fromkeys(parts, 0.0)
        carried = layout.shardings_of(state.trainable), dict.fromkeys(parts, replicated)
        (grads, totals), _ = jax.lax.scan(add_micro_batch, nothing, jnp.arange(micro_batches))
        grad_norm = optax.tree.norm(grads)
        total = sum(totals[name] / weight[name] for name in parts)
        good = jnp.isfinite(total) & jnp.isfinite(grad_norm)

        # Not a choice between two states afterwards: that holds both of them.
        def change(trainable, opt_state):
            updates, opt_state = optimizer.update(grads, opt_state, trainable)
            numbers = sum(leaf.size for leaf in jax.tree.leaves(updates))
            rms = optax.tree.norm(updates) / math.sqrt(numbers)
            return optax.apply_updates(trainable, updates), opt_state, rms

        def keep(trainable, opt_state):
            return trainable, opt_state, jnp.zeros(())

        *kept, update_rms = jax.lax.cond(good, change, keep, state.trainable, state.opt_state)
        sums = {
            "targets": masked_count(batch.target_mask_BN),
            "grad_norm": grad_norm,
            "update_rms": update_rms,
            "good": good.astype(jnp.float32),
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
        }
        for name in parts:
            sums |= {f"{name}_sum": totals[name], f"{name}_weight": weight[name]}
        new = TrainState(state.step + 1, *kept)
        places = layout.shardings_of(new), dict.fromkeys(sums, replicated)
        return jax.lax.with_sharding_constraint((new, sums), places)

    return jax.jit(step, donate_argnums=0, static_argnames="divergence")


def make_loss(decoder: Decoder, config: Config, mesh: Mesh) -> Callable:
    """Builds the jitted loss of a state, without its gradient and without dropout.

    Returns:
      loss(trainable, frozen, batch, targets, anchors, *, divergence) -> float32 scalar in nats: the
      loss of the batch and those of the anchors, weighted as the step weights them.
    """
    objective_of = _objective(decoder, config, mesh)

    def loss(trainable, frozen, batch, targets, anchors, *, divergence: str):
        *_, objective = objective_of(batch, targets, anchors, divergence)
        params = student_params(frozen, trainable)
        micro = jnp.arange(config.train.grad_accum_steps)
        return jnp.sum(jax.lax.map(lambda i: objective(params, i)[0], micro))

    return jax.jit(loss, static_argnames="divergence")


def _objective(decoder: Decoder, config: Config, mesh: Mesh) -> Callable:
    """Makes (batch, targets, anchors, divergence) -> the parts by name, the weight of each, and
    objective(params, micro) -> (a micro-batch's share of the loss, the sum of each part)."""
    gkd, anchor_config = config.gkd, config.anchor
    factors = {each.name: each.weight for each in anchor_sets(anchor_config)} | {"loss": 1.0}

    def part_loss(params, part: Part, divergence: str) -> jax.Array:
        batch, targets = part
        tokens_BS, mask_BS = batch.student_tokens_BS, batch.student_mask_BS
        hidden_BSD = decoder.apply({"params": params}, tokens_BS, mask_BS)
        hidden_BND = jnp.take_along_axis(hidden_BSD, batch.student_at_BN[:, :, None], axis=1)
        summed, _ = weighted_divergence(
            hidden_BND,
            unembedding_table(decoder.spec, params),
            decoder.spec.final_softcap,
            targets,
            token_weights(batch.target_mask_BN, gkd.reduction),
            divergence,
            **gkd.of_loss(),
            **head_axes(mesh),
        )
        return summed

    def objective_of(batch, targets, anchors, divergence: str):
        parts = {"loss": (batch, targets)} | anchors
        kinds = dict.fromkeys(parts, anchor_config.divergence) | {"loss": divergence}
        weight = {
            name: masked_count(token_weights(of.target_mask_BN, gkd.reduction))
            for name, (of, _) in parts.items()
        }

        def objective(params, micro):
            total, sums = 0.0, {}
            for name, part in parts.items():
                rows = _micro_batch(part, micro, config.train.grad_accum_steps)
                sums[name] = part_loss(params, rows, kinds[name])
                total += sums[name] * (factors[name] / weight[name])
            return total, sums

        return parts, weight, objective

    return objective_of


def _micro_batch(part: Part, micro: jax.Array, micro_batches: int) -> Part:
    """Takes every `micro_batches`-th row from `micro` on, so that each device keeps its share."""

    def take(x):
        x = x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(x, micro, axis=1, keepdims=False)

    batch, targets = part
    if isinstance(targets, DenseTargets):  # its unembedding has no rows
        targets = dataclasses.replace(targets, hidden_BNE=take(targets.hidden_BNE))
    else:
        targets = jax.tree.map(take, targets)
    return jax.tree.map(take, batch), targets
