"""The train step: per-token means however a batch is cut, every loss, and what it may not touch."""

import dataclasses
import functools

import builders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gkdjax import losses
from gkdjax.config import Anchor, Gkd, Optim, Train
from gkdjax.losses import top_k_logprobs
from gkdjax.losses.objective import TopKTargets
from gkdjax.models import lora
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.train import optimizer as train_optimizer
from gkdjax.train.step import init_state, make_train_step
from gkdjax.types import TrainState

RAGGED = (4, 1, 2, 1, 1, 1, 3, 1)  # targets a row: parts of a batch hold 9 and 5, 7 and 2 ...
BATCH = builders.batch(RAGGED)
TARGETS = builders.dense_targets(BATCH)
SGD = optax.sgd(1.0)  # its update is the gradient itself: nothing hides a wrong scale
DECODER, PARAMS = builders.small_model()
RATE = 0.125


@functools.cache
def step_function(accumulation=1, seed=0, remat=False, devices=1, reduction="token"):
    """A step on the small model; each distinct call compiles a program, so ask for few."""
    names = {"chat": "chat.jsonl", "code": "code.jsonl"}
    config = builders.config(
        gkd=Gkd("forward_kl", reduction=reduction),
        anchor=Anchor(names, {"chat": 0.5, "code": 2.0}, divergence="reverse_kl"),
        train=Train(grad_accum_steps=accumulation, seed=seed),
    )
    mesh = parallel_mesh.make_mesh(devices=jax.local_devices()[:devices])
    decoder = dataclasses.replace(DECODER, remat=remat)
    step = make_train_step(decoder, SGD, optax.constant_schedule(RATE), config, mesh)

    def call(state, frozen, batch=BATCH, targets=TARGETS, *, divergence="forward_kl", **anchors):
        batch = parallel_mesh.shard_rows(mesh, batch)
        state, frozen = parallel_mesh.replicate(mesh, (state, frozen))
        return step(state, frozen, batch, targets, anchors, divergence=divergence)

    return call


def adapters(dropout: float = 0.0) -> dict:
    """On two kernels: each more would make every program here longer to compile."""
    return builders.adapters(DECODER, dropout=dropout, names=("q_proj", "down_proj"))


def lora_state(dropout: float = 0.0, step: int = 0) -> TrainState:
    """Fresh arrays each time: the step takes its state away."""
    state = init_state(adapters(dropout), SGD)
    return dataclasses.replace(state, step=jnp.int32(step))


def leaves(state: TrainState) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.trainable)]


def assert_close(state, other, rtol=1e-5, atol=2e-6):
    for got, wanted in zip(leaves(state), leaves(other), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=atol)


def largest_difference(state, other) -> float:
    pairs = zip(leaves(state), leaves(other), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@functools.cache
def reference() -> tuple[TrainState, dict]:
    """One step of the whole batch on one device."""
    state, sums = step_function()(lora_state(), PARAMS)
    return state, {name: float(value) for name, value in sums.items()}


def student_logits(params=PARAMS, batch=BATCH):
    """float32 [B,N,V] the straight way, adapters merged."""
    hidden = _hidden(params, batch.student_tokens_BS, batch.student_mask_BS)
    rows = np.arange(len(RAGGED))[:, None]
    return np.asarray(hidden)[rows, batch.student_at_BN] @ np.asarray(params["embedding"]).T


@jax.jit
def _hidden(params, tokens_BS, mask_BS):
    return DECODER.apply({"params": params}, tokens_BS, mask_BS)


@functools.cache
def merged_logits():
    return student_logits(lora.merge(PARAMS, adapters()))


def test_the_sums_are_those_of_the_tokens():
    state, sums = reference()
    loss_BN = losses.forward_kl(jnp.asarray(merged_logits()), builders.teacher_logits(TARGETS))
    wanted = np.asarray(loss_BN)[BATCH.target_mask_BN].sum()
    np.testing.assert_allclose(sums["loss_sum"], wanted, rtol=1e-5)
    assert sums["targets"] == sum(RAGGED)
    assert sums["learning_rate"] == RATE
    norm = np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(leaves(state), START, strict=True)))
    np.testing.assert_allclose(sums["grad_norm"], norm, rtol=1e-4)
    assert int(state.step) == 1


START = leaves(lora_state())


@pytest.mark.parametrize("accumulation, devices", [(4, 1), (2, 4)])
def test_parts_and_devices_make_the_one_large_batch(accumulation, devices):
    step = step_function(accumulation=accumulation, devices=devices)
    state, sums = step(lora_state(), PARAMS)
    wanted_state, wanted_sums = reference()
    assert_close(state, wanted_state)
    for name, value in wanted_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5)
    for leaf in jax.tree.leaves((state, sums)):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == devices


def test_a_mean_of_means_would_be_seen():
    """The same batch in two halves, as `accumulation` cuts it, each averaged by itself."""
    updates, means = [], []
    for half in (0, 1):
        keep = (np.arange(len(RAGGED)) % 2 == half)[:, None]
        part = dataclasses.replace(BATCH, target_mask_BN=BATCH.target_mask_BN & keep)
        state, sums = step_function()(lora_state(), PARAMS, part)
        updates.append([got - start for got, start in zip(leaves(state), START, strict=True)])
        means.append(float(sums["loss_sum"] / sums["targets"]))
    wanted_state, wanted_sums = reference()
    gap = abs(np.mean(means) - wanted_sums["loss_sum"] / wanted_sums["targets"])
    assert gap > 1e-2  # the tests above allow 1e-5
    pairs = zip(leaves(wanted_state), START, *updates, strict=True)
    assert max(np.abs((a + b) / 2 - (w - s)).max() for w, s, a, b in pairs) > 1e-3


def test_the_state_is_donated_and_the_base_is_not():
    state, frozen = lora_state(), jax.tree.map(jnp.copy, PARAMS)
    before = jax.tree.map(np.asarray, frozen)
    step_function()(state, frozen)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    jax.tree.map(np.testing.assert_array_equal, frozen, before)  # alive and unchanged


def test_the_divergence_of_a_call_is_its_argument():
    """Warm-up steps run through the same function with another name."""
    step = step_function()
    _, forward = step(lora_state(), PARAMS)
    _, reverse = step(lora_state(), PARAMS, divergence="reverse_kl")
    wanted = losses.reverse_kl(jnp.asarray(merged_logits()), builders.teacher_logits(TARGETS))
    np.testing.assert_allclose(
        reverse["loss_sum"], np.asarray(wanted)[BATCH.target_mask_BN].sum(), rtol=1e-5
    )
    assert abs(float(forward["loss_sum"] - reverse["loss_sum"])) > 0.1


def top_k_targets(k: int) -> TopKTargets:
    top_k = top_k_logprobs(builders.teacher_logits(TARGETS), k)
    return TopKTargets(top_k, jnp.zeros(BATCH.target_mask_BN.shape))


def test_all_k_are_dense_and_accumulate():
    whole, mask_BN = top_k_targets(32), BATCH.target_mask_BN
    topk = dataclasses.replace(  # rubbish where nothing is asked
        whole.topk,
        ids=jnp.where(mask_BN[:, :, None], whole.topk.ids, -7),
        logprobs=jnp.where(mask_BN[:, :, None], whole.topk.logprobs, jnp.nan),
        tail_logprob=jnp.where(mask_BN, whole.topk.tail_logprob, jnp.nan),
    )
    targets = dataclasses.replace(whole, topk=topk)
    state, sums = step_function(accumulation=2)(lora_state(), PARAMS, targets=targets)
    assert_close(state, reference()[0], atol=1e-5)
    np.testing.assert_allclose(sums["loss_sum"], reference()[1]["loss_sum"], rtol=1e-5)


def test_padding_and_remat_change_nothing():
    longer = builders.batch(RAGGED, length=11)
    state, sums = step_function(remat=True)(lora_state(), PARAMS, longer)
    assert_close(state, reference()[0])
    np.testing.assert_allclose(sums["loss_sum"], reference()[1]["loss_sum"], rtol=1e-5)


def test_only_what_is_read_and_asked_for_matters():
    """Padded ids and a teacher's values where there is no target may be anything, even NaN."""
    ids = np.where(BATCH.student_mask_BS, BATCH.student_tokens_BS, 9)
    padded = dataclasses.replace(BATCH, student_tokens_BS=ids)
    hidden = jnp.where(BATCH.target_mask_BN[:, :, None], TARGETS.hidden_BNE, jnp.nan)
    targets = dataclasses.replace(TARGETS, hidden_BNE=hidden)
    state, _ = step_function()(lora_state(), PARAMS, padded, targets)
    assert_close(state, reference()[0])
    # A token of a prompt, on the other hand, is read.
    ids[:, 1] = 3 + ids[:, 1] % 7
    other = dataclasses.replace(BATCH, student_tokens_BS=ids)
    _, sums = step_function()(lora_state(), PARAMS, other)
    assert abs(float(sums["loss_sum"]) - reference()[1]["loss_sum"]) > 1e-2


def test_nan_in_a_target_is_seen():
    nan = TARGETS.hidden_BNE.at[2, 0, 0].set(jnp.nan)
    _, sums = step_function()(
        lora_state(), PARAMS, targets=dataclasses.replace(TARGETS, hidden_BNE=nan)
    )
    assert not np.isfinite(sums["loss_sum"])
    assert not np.isfinite(sums["grad_norm"])


def test_each_anchor_adds_its_weighted_mean():
    counts = {"chat": (2, 4, 1, 3, 1, 2, 2, 1), "code": (1, 1, 2, 1, 1, 4, 1, 2)}
    anchors, alone = {}, {}
    for seed, (name, row_targets) in enumerate(counts.items(), start=8):
        batch = builders.batch(row_targets, seed=seed)
        anchors[f"anchor_{name}"] = (batch, builders.dense_targets(batch, seed=seed + 10))
        alone[name] = step_function()(
            lora_state(), PARAMS, *anchors[f"anchor_{name}"], divergence="reverse_kl"
        )
    state, sums = step_function(accumulation=2)(lora_state(), PARAMS, **anchors)
    main, main_sums = reference()
    np.testing.assert_allclose(sums["loss_sum"], main_sums["loss_sum"], rtol=1e-5)
    for name, row_targets in counts.items():
        np.testing.assert_allclose(
            sums[f"anchor_{name}_sum"], alone[name][1]["loss_sum"], rtol=1e-5
        )
        assert sums[f"anchor_{name}_weight"] == sum(row_targets)
    assert sums["targets"] == sums["loss_weight"] == sum(RAGGED)
    states = (state, main, alone["chat"][0], alone["code"][0])
    for got, m, chat, code, start in zip(*map(leaves, states), START, strict=True):
        wanted = m - start + 0.5 * (chat - start) + 2.0 * (code - start)
        np.testing.assert_allclose(got - start, wanted, rtol=1e-4, atol=5e-6)


def test_a_mean_over_examples_weighs_each_row_alike():
    """bakery's reduction: the mean of the rows' means, however the batch is cut."""
    loss_BN = losses.forward_kl(jnp.asarray(merged_logits()), builders.teacher_logits(TARGETS))
    rows = zip(np.asarray(loss_BN, np.float64), BATCH.target_mask_BN, strict=True)
    means = [loss[mask].mean() for loss, mask in rows]
    state, sums = step_function(reduction="example")(lora_state(), PARAMS)
    np.testing.assert_allclose(sums["loss_sum"] / sums["loss_weight"], np.mean(means), rtol=1e-5)
    assert sums["targets"] == sum(RAGGED)
    by_token = reference()[1]
    assert abs(np.mean(means) - by_token["loss_sum"] / by_token["targets"]) > 1e-3
    cut, cut_sums = step_function(accumulation=2, reduction="example")(lora_state(), PARAMS)
    np.testing.assert_allclose(cut_sums["loss_sum"], sums["loss_sum"], rtol=1e-5)
    assert_close(cut, state)
    # And so is the gradient: the mean of those of the rows, each alone in its batch.
    singles = []
    for row in range(len(RAGGED)):
        alone = BATCH.target_mask_BN & (np.arange(len(RAGGED)) == row)[:, None]
        batch = dataclasses.replace(BATCH, target_mask_BN=alone)
        singles.append(leaves(step_function()(lora_state(), PARAMS, batch)[0]))
    for got, start, *each in zip(leaves(state), START, *singles, strict=True):
        wanted = np.mean([one - start for one in each], axis=0)
        np.testing.assert_allclose(got - start, wanted, rtol=1e-4, atol=2e-6)


def test_dropout_is_a_function_of_seed_and_step():
    step = step_function()

    def after(number, step=step):
        return step(lora_state(0.5, number), PARAMS)[0]

    first = after(0)
    assert largest_difference(after(0), first) == 0.0
    assert largest_difference(after(1), first) > 1e-3
    assert largest_difference(reference()[0], first) > 1e-3  # it is on
    assert largest_difference(after(0, step_function(seed=1)), first) > 1e-3


def test_full_fine_tuning_is_adamw_of_every_parameter():
    optimizer_config = Optim(learning_rate=0.01, warmup_ratio=0.0, max_grad_norm=0.5)
    optimizer = train_optimizer.optimizer(optimizer_config, 10)
    mesh = parallel_mesh.make_mesh()
    config = builders.config(gkd=Gkd("forward_kl"), train=Train(grad_accum_steps=2))
    schedule = train_optimizer.schedule(optimizer_config, 10)
    step = make_train_step(DECODER, optimizer, schedule, config, mesh)
    state = init_state(jax.tree.map(jnp.copy, PARAMS), optimizer)
    state = parallel_mesh.replicate(mesh, state)
    got, sums = step(
        *(state, None, parallel_mesh.shard_rows(mesh, BATCH), TARGETS, {}), divergence="forward_kl"
    )

    @jax.jit
    @jax.grad
    def gradient(params):
        variables = {"params": params}
        hidden = DECODER.apply(variables, BATCH.student_tokens_BS, BATCH.student_mask_BS)
        logits = DECODER.apply(variables, hidden, method="unembed")
        rows = np.arange(len(RAGGED))[:, None]
        loss_BN = losses.forward_kl(
            logits[rows, BATCH.student_at_BN], builders.teacher_logits(TARGETS)
        )
        return jnp.sum(jnp.where(BATCH.target_mask_BN, loss_BN, 0.0)) / sum(RAGGED)

    grads = gradient(PARAMS)
    norm = np.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(sums["grad_norm"], norm, rtol=1e-5)
    assert norm > 0.5  # the clip acts

    def check(new, old, grad):
        clipped = np.asarray(grad) * 0.5 / norm
        sure = np.abs(clipped) > 1e-5  # Adam's first step is all but the sign
        wanted = old - 0.01 * clipped / (np.abs(clipped) + 1e-8)
        np.testing.assert_allclose(np.asarray(new)[sure], wanted[sure], atol=2e-5)
        assert sure.mean() > 0.5

    jax.tree.map(check, got.trainable, jax.tree.map(np.asarray, PARAMS), grads)
