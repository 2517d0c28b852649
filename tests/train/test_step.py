"""The train step: per-token means however a batch is divided, and what it may not touch."""

import dataclasses
import functools

import builders
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gkdjax import losses
from gkdjax.config import Anchor, Gkd, Train
from gkdjax.losses import top_k_logprobs
from gkdjax.losses.objective import TopKTargets
from gkdjax.models import lora
from gkdjax.parallel.mesh import make_mesh, replicate, shard_rows
from gkdjax.train.step import init_state, make_train_step

RAGGED = (4, 1, 2, 1, 1, 1, 3, 1)  # targets a row: micro-batches hold 9 and 5, 7 and 2 ...
BATCH = builders.batch(RAGGED)
TARGETS = builders.dense_targets(BATCH)
SGD = optax.sgd(1.0)  # its update is the gradient itself: nothing hides a wrong scale
DECODER, PARAMS = builders.small_model()
RATE = 0.125
NAMES = {"chat": "chat.jsonl", "code": "code.jsonl"}
ANCHOR = Anchor(NAMES, {"chat": 0.5, "code": 2.0}, divergence="reverse_kl")


@functools.cache
def step_function(accumulation=1, seed=0, remat=False, devices=1, reduction="token"):
    """A step on the small model; each distinct call compiles a program, so ask for few."""
    gkd = Gkd("forward_kl", reduction=reduction)
    train = Train(grad_accum_steps=accumulation, seed=seed)
    config = builders.config(gkd=gkd, anchor=ANCHOR, train=train)
    mesh = make_mesh(devices=jax.local_devices()[:devices])
    decoder = dataclasses.replace(DECODER, remat=remat)
    step = make_train_step(decoder, SGD, optax.constant_schedule(RATE), config, mesh)

    def call(state, frozen, batch=BATCH, targets=TARGETS, *, divergence="forward_kl", **anchors):
        state, frozen = replicate(mesh, (state, frozen))
        rows = shard_rows(mesh, batch)
        return step(state, frozen, rows, targets, anchors, divergence=divergence)

    return call


def lora_state(dropout: float = 0.0, step: int = 0):
    """Fresh adapters of two kernels each time: the step donates its state."""
    adapters = builders.adapters(DECODER, dropout=dropout, names=("q_proj", "down_proj"))
    return dataclasses.replace(init_state(adapters, SGD), step=jnp.int32(step))


def leaves(state) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.trainable)]


START = leaves(lora_state())


def gradients(state) -> list[np.ndarray]:
    return [start - leaf for start, leaf in zip(START, leaves(state), strict=True)]


def assert_close(state, other, rtol=1e-5, atol=2e-6):
    for got, wanted in zip(leaves(state), leaves(other), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=atol)


def largest_difference(state, other) -> float:
    pairs = zip(leaves(state), leaves(other), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@functools.cache
def reference() -> tuple:
    """One step of the whole batch on one device."""
    state, sums = step_function()(lora_state(), PARAMS)
    return state, {name: float(value) for name, value in sums.items()}


@functools.cache
def token_losses(divergence: str) -> list[np.ndarray]:
    """The loss of each target, row by row, computed from logits with the adapters merged."""
    params = lora.merge(PARAMS, lora_state().trainable)
    hidden = DECODER.apply({"params": params}, BATCH.student_tokens_BS, BATCH.student_mask_BS)
    logits = DECODER.apply({"params": params}, hidden, method="unembed")
    logits = logits[np.arange(len(RAGGED))[:, None], BATCH.student_at_BN]
    loss_BN = getattr(losses, divergence)(logits, builders.teacher_logits(TARGETS))
    rows = zip(np.asarray(loss_BN, np.float64), BATCH.target_mask_BN, strict=True)
    return [loss[mask] for loss, mask in rows]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_sums_are_those_of_the_tokens(divergence):
    """The divergence is an argument: warm-up steps call the same function with another one."""
    state, sums = step_function()(lora_state(), PARAMS, divergence=divergence)
    wanted = np.concatenate(token_losses(divergence)).sum()
    np.testing.assert_allclose(sums["loss_sum"], wanted, rtol=1e-5)
    assert sums["targets"] == sums["loss_weight"] == sum(RAGGED)
    assert sums["learning_rate"] == RATE and int(state.step) == 1
    norm = np.sqrt(sum((g**2).sum() for g in gradients(state)))
    np.testing.assert_allclose(sums["grad_norm"], norm, rtol=1e-4)


def _nan_without_target(targets: TopKTargets) -> TopKTargets:
    mask_BN, topk = BATCH.target_mask_BN, targets.topk
    topk = dataclasses.replace(
        topk,
        ids=jnp.where(mask_BN[:, :, None], topk.ids, -7),
        logprobs=jnp.where(mask_BN[:, :, None], topk.logprobs, jnp.nan),
        tail_logprob=jnp.where(mask_BN, topk.tail_logprob, jnp.nan),
    )
    return dataclasses.replace(targets, topk=topk)


_TOPK = top_k_logprobs(builders.teacher_logits(TARGETS), 32)
_HIDDEN = jnp.where(BATCH.target_mask_BN[:, :, None], TARGETS.hidden_BNE, jnp.nan)
_IDS = np.where(BATCH.student_mask_BS, BATCH.student_tokens_BS, 9)
# What must not change a step -> how it is built, its batch and its targets.
SAME = {
    "four micro-batches": ({"accumulation": 4}, BATCH, TARGETS),
    "two micro-batches on four devices": ({"accumulation": 2, "devices": 4}, BATCH, TARGETS),
    "remat, more padding": ({"remat": True}, builders.batch(RAGGED, length=11), TARGETS),
    "padded ids, NaN without a target": (
        {},
        dataclasses.replace(BATCH, student_tokens_BS=_IDS),
        dataclasses.replace(TARGETS, hidden_BNE=_HIDDEN),
    ),
    "all K of the vocabulary": (
        {"accumulation": 2},
        BATCH,
        _nan_without_target(TopKTargets(_TOPK, jnp.zeros(BATCH.target_mask_BN.shape))),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_the_step_is_the_same(name):
    how, batch, targets = SAME[name]
    state, sums = step_function(**how)(lora_state(), PARAMS, batch, targets)
    wanted_state, wanted_sums = reference()
    assert_close(state, wanted_state, atol=1e-5)
    for key, value in wanted_sums.items():
        np.testing.assert_allclose(sums[key], value, rtol=1e-5)
    for leaf in jax.tree.leaves((state, sums)):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == how.get("devices", 1)


def test_a_token_of_the_prompt_is_read_and_nan_in_a_target_is_seen():
    ids = np.array(BATCH.student_tokens_BS)
    ids[:, 1] = 3 + ids[:, 1] % 7
    other = dataclasses.replace(BATCH, student_tokens_BS=ids)
    _, sums = step_function()(lora_state(), PARAMS, other)
    assert abs(float(sums["loss_sum"]) - reference()[1]["loss_sum"]) > 1e-2
    nan = dataclasses.replace(TARGETS, hidden_BNE=TARGETS.hidden_BNE.at[2, 0, 0].set(jnp.nan))
    _, sums = step_function()(lora_state(), PARAMS, targets=nan)
    assert not np.isfinite(sums["loss_sum"]) and not np.isfinite(sums["grad_norm"])


def test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is():
    state = lora_state()
    adapters = {
        name: dataclasses.replace(each, a=each.a * 1e30, b=jnp.zeros_like(each.b))
        for name, each in state.trainable.items()
    }
    before = jax.tree.map(np.asarray, adapters)
    state, sums = step_function()(dataclasses.replace(state, trainable=adapters), PARAMS)
    assert np.isfinite(sums["loss_sum"]) and not np.isfinite(sums["grad_norm"])
    assert not sums["good"]
    jax.tree.map(np.testing.assert_array_equal, state.trainable, before)


def test_the_state_is_donated_and_the_base_is_not():
    state, frozen = lora_state(), jax.tree.map(jnp.copy, PARAMS)
    before = jax.tree.map(np.asarray, frozen)
    step_function()(state, frozen)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    jax.tree.map(np.testing.assert_array_equal, frozen, before)  # alive and unchanged


def test_each_anchor_adds_its_weighted_mean():
    counts = {"chat": (2, 4, 1, 3, 1, 2, 2, 1), "code": (1, 1, 2, 1, 1, 4, 1, 2)}
    anchors, alone = {}, {}
    for seed, (name, row_targets) in enumerate(counts.items(), start=8):
        batch = builders.batch(row_targets, seed=seed)
        part = anchors[f"anchor_{name}"] = batch, builders.dense_targets(batch, seed=seed + 10)
        alone[name] = step_function()(lora_state(), PARAMS, *part, divergence="reverse_kl")
    state, sums = step_function(accumulation=2)(lora_state(), PARAMS, **anchors)
    main, main_sums = reference()
    np.testing.assert_allclose(sums["loss_sum"], main_sums["loss_sum"], rtol=1e-5)
    assert sums["targets"] == sums["loss_weight"] == sum(RAGGED)
    for name, (_, own) in alone.items():
        np.testing.assert_allclose(sums[f"anchor_{name}_sum"], own["loss_sum"], rtol=1e-5)
        assert sums[f"anchor_{name}_weight"] == sum(counts[name])
    states = state, main, alone["chat"][0], alone["code"][0]
    for got, m, chat, code in zip(*map(gradients, states), strict=True):
        np.testing.assert_allclose(got, m + 0.5 * chat + 2.0 * code, rtol=1e-4, atol=5e-6)


def test_a_mean_over_examples_weighs_each_row_alike():
    """bakery's reduction: the mean of the rows' means, however the batch is divided."""
    mean = np.mean([loss.mean() for loss in token_losses("forward_kl")])
    state, sums = step_function(reduction="example")(lora_state(), PARAMS)
    np.testing.assert_allclose(sums["loss_sum"] / sums["loss_weight"], mean, rtol=1e-5)
    assert sums["targets"] == sum(RAGGED)
    by_token = reference()[1]
    assert abs(mean - by_token["loss_sum"] / by_token["targets"]) > 1e-3
    divided, divided_sums = step_function(accumulation=2, reduction="example")(lora_state(), PARAMS)
    np.testing.assert_allclose(divided_sums["loss_sum"], sums["loss_sum"], rtol=1e-5)
    assert_close(divided, state)


def test_dropout_is_a_function_of_seed_and_step():
    def after(number, **how):
        return step_function(**how)(lora_state(0.5, number), PARAMS)[0]

    first = after(0)
    assert largest_difference(after(0), first) == 0.0
    for other in (after(1), reference()[0], after(0, seed=1)):  # the second is without dropout
        assert largest_difference(other, first) > 1e-3


def test_full_fine_tuning_has_the_gradient_of_every_parameter():
    start = jax.tree.map(jnp.copy, PARAMS)
    state, sums = step_function(accumulation=2)(init_state(start, SGD), None)

    @jax.jit
    @jax.grad
    def gradient(params):
        variables = {"params": params}
        hidden = DECODER.apply(variables, BATCH.student_tokens_BS, BATCH.student_mask_BS)
        logits = DECODER.apply(variables, hidden, method="unembed")
        logits = logits[np.arange(len(RAGGED))[:, None], BATCH.student_at_BN]
        loss_BN = losses.forward_kl(logits, builders.teacher_logits(TARGETS))
        return jnp.sum(jnp.where(BATCH.target_mask_BN, loss_BN, 0.0)) / sum(RAGGED)

    wanted = gradient(PARAMS)
    norm = np.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(wanted)))
    np.testing.assert_allclose(sums["grad_norm"], norm, rtol=1e-5)
    for new, old, grad in zip(
        *map(jax.tree.leaves, (state.trainable, PARAMS, wanted)), strict=True
    ):
        np.testing.assert_allclose(old - new, grad, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("full", [False, True])
def test_devices_exchange_sums_and_gradients_only(full):
    mesh = make_mesh()
    assert mesh.size == 4
    config = builders.config(gkd=Gkd("forward_kl"), train=Train(grad_accum_steps=2))
    step = make_train_step(DECODER, SGD, optax.constant_schedule(0.1), config, mesh)
    frozen, trainable = (None, PARAMS) if full else (PARAMS, builders.adapters(DECODER))
    whole = replicate(mesh, (init_state(trainable, SGD), frozen))
    hidden, table = TARGETS.hidden_BNE, TARGETS.unembedding_VE
    targets = dataclasses.replace(
        TARGETS, hidden_BNE=shard_rows(mesh, hidden), unembedding_VE=replicate(mesh, table)
    )
    rows = shard_rows(mesh, BATCH)
    lowered = step.lower(*whole, rows, targets, {}, divergence="forward_kl")
    found = hlo.collectives(lowered.compile().as_text())
    assert {each.kind for each in found} == {"all-reduce"}
