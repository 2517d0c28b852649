"""The benchmark's variants of one optimizer step, on the same random models and batch.

- "unfused": a reference that is written here, as one would without this package's heads: both
  models' logits [B,N,V], `losses.forward_kl`, the gradient by autodiff.
- "plain": the same with the KL of a textbook, which does not provide for logits of -inf and lets
  small divergences drown in rounding: what an unfused step costs at least.
- "dense": `make_train_step` against `DenseTargets` that a `LocalTeacher` makes anew in each step.
- "topk": the same with `TopKTargets`.
- "stored": `TopKTargets` made once, before; no teacher is there any more.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh

from gkdjax import config, losses
from gkdjax.benchmarks.case import PLAIN, STUDENTS, TEACHERS, UNFUSED, Case, Shape, decoder_spec
from gkdjax.models import lora
from gkdjax.models.decoder import Decoder
from gkdjax.models.decoder_config import param_shapes
from gkdjax.models.lora import student_params
from gkdjax.models.prefix_cache import predicting_hidden
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.teachers.local import LocalTeacher
from gkdjax.train import optimizer as train_optimizer
from gkdjax.train.step import init_state, make_train_step
from gkdjax.types import Batch, TrainState

_DIVERGENCE = "forward_kl"
# Dropout would draw from keys that the reference step does not have.
_LORA = config.Lora(rank=64, alpha=128.0, dropout=0.0)
_OPTIM = config.Optim(schedule="constant", warmup_ratio=0.0)


class Prepared(NamedTuple):
    """A compiled step and what it starts from."""

    step: Callable[[TrainState], tuple[TrainState, dict]]  # teacher included; donates the state
    state: TrainState
    temp_bytes: int  # XLA's scratch memory of the step's program


def prepare(case: Case) -> Prepared:
    """Builds models, batch and state of a case and compiles its step."""
    batch = make_batch(case)
    if case.variant in _UNFUSED_KL:
        return _prepare_unfused(case, batch)
    mesh = _one_device()
    teacher = _teacher(case, mesh)
    batch = parallel_mesh.shard_rows(mesh, batch)
    make_targets = teacher.targets
    if case.variant == "stored":
        stored = jax.block_until_ready(teacher.targets(batch))
        del teacher  # a store needs none: its weights shall not count

        def make_targets(batch):
            return stored

    decoder, state, frozen = _student(case)
    state, frozen = parallel_mesh.replicate(mesh, (state, frozen))
    gkd = config.Gkd(divergence=_DIVERGENCE, chunk_size=case.chunk_size)
    schedule = train_optimizer.schedule(_OPTIM, case.steps)
    step = make_train_step(decoder, _optimizer(case), schedule, config.Config(gkd=gkd), mesh)
    compiled = step.lower(
        state, frozen, batch, make_targets(batch), {}, divergence=_DIVERGENCE
    ).compile()
    return Prepared(
        lambda state: compiled(state, frozen, batch, make_targets(batch), {}),
        state,
        _temp_bytes(compiled),
    )


def _one_device() -> Mesh:
    """Of a machine's several devices the first: the reference step knows no other."""
    return parallel_mesh.make_mesh(devices=jax.local_devices()[:1])


def make_batch(case: Case) -> Batch:
    """Random tokens; teacher and student read the same ones."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, case.vocab, (case.rows, case.length + 1)).astype(np.int32)
    prompt = {"none": 0, "half": case.length // 2}[case.prompts]
    at_N = np.arange(prompt, case.length, dtype=np.int32)
    at_BN = np.broadcast_to(at_N, (case.rows, at_N.size))
    tokens_BS, mask_BS = tokens[:, :-1], np.ones((case.rows, case.length), bool)
    return Batch(
        student_tokens_BS=tokens_BS,
        student_mask_BS=mask_BS,
        student_at_BN=at_BN,
        teacher_tokens_BT=tokens_BS,
        teacher_mask_BT=mask_BS,
        teacher_at_BN=at_BN,
        target_ids_BN=tokens[:, at_N + 1],
        target_mask_BN=np.ones(at_BN.shape, bool),
        row_id_B=np.arange(case.rows, dtype=np.int32),
    )


def _prepare_unfused(case: Case, batch: Batch) -> Prepared:
    teacher, teacher_params = _model(TEACHERS[case.teacher], case, seed=1)
    decoder, state, frozen = _student(case)
    step = unfused_step(decoder, teacher, _optimizer(case), _UNFUSED_KL[case.variant])
    batch = jax.device_put(batch)
    compiled = step.lower(state, frozen, teacher_params, batch).compile()
    return Prepared(
        lambda state: compiled(state, frozen, teacher_params, batch), state, _temp_bytes(compiled)
    )


def _plain_kl(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    log_q, log_p = jax.nn.log_softmax(student_logits), jax.nn.log_softmax(teacher_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


_UNFUSED_KL = {UNFUSED: losses.forward_kl, PLAIN: _plain_kl}


def unfused_step(decoder: Decoder, teacher: Decoder, optimizer, forward_kl: Callable) -> Callable:
    """step(state, frozen, teacher_params, batch) -> (state, sums), `make_train_step`'s update.

    The predicting positions are gathered before the head here too: what it is compared with shall
    not win by that.
    """

    def step(state: TrainState, frozen, teacher_params, batch: Batch):
        teacher_BNV = jax.lax.stop_gradient(
            _logits(
                teacher,
                teacher_params,
                batch.teacher_tokens_BT,
                batch.teacher_mask_BT,
                batch.teacher_at_BN,
            )
        )
        count = losses.masked_count(batch.target_mask_BN)

        def objective(trainable):
            student_BNV = _logits(
                decoder,
                student_params(frozen, trainable),
                batch.student_tokens_BS,
                batch.student_mask_BS,
                batch.student_at_BN,
            )
            each_BN = forward_kl(student_BNV, teacher_BNV)
            summed = losses.masked_sum(each_BN, batch.target_mask_BN)
            return summed / count, summed

        grads, summed = jax.grad(objective, has_aux=True)(state.trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, opt_state), {
            "loss_sum": summed,
            "targets": count,
        }

    return jax.jit(step, donate_argnames="state")


def _logits(decoder: Decoder, params, tokens, mask, at_BN) -> jax.Array:
    hidden_BND = predicting_hidden(decoder, params, tokens, mask, at_BN)
    return decoder.apply({"params": params}, hidden_BND, method="unembed")


def _teacher(case: Case, mesh: Mesh) -> LocalTeacher:
    decoder, params = _model(TEACHERS[case.teacher], case, seed=1)
    return LocalTeacher(
        decoder,
        parallel_mesh.replicate(mesh, params),
        chat=None,  # only renders views, and the batch is there
        description="random weights",
        top_k=None if case.variant == "dense" else case.top_k,
        temperature=1.0,
        vocab_size=case.vocab,
        lengths=(case.length,),
        batch_size=case.rows,
        chunk_size=case.chunk_size,
        mesh=mesh,
        prefix_bytes=0,
    )


def _student(case: Case) -> tuple[Decoder, TrainState, dict | None]:
    decoder, params = _model(STUDENTS[case.student], case, seed=0)
    if case.tuning == "lora":
        adapters = lora.init(jax.random.key(0), params, _LORA)
        return decoder, init_state(adapters, _optimizer(case)), params
    masters = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return decoder, init_state(masters, _optimizer(case)), None


def _model(shape: Shape, case: Case, seed: int) -> tuple[Decoder, dict]:
    """Random weights at a scale where logits have a standard deviation of about 1."""
    spec, dtype = decoder_spec(shape, case.vocab), jnp.dtype(case.dtype)
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, size in param_shapes(spec).items():
        if path.endswith("norm"):
            leaf = np.zeros(size, np.float32)
        else:
            fan_in = size[-2] if path.startswith("layers/") else size[-1]
            leaf = rng.standard_normal(size, np.float32)
            leaf *= np.float32(fan_in**-0.5)
        leaves[path] = jnp.asarray(leaf, dtype)
    params = traverse_util.unflatten_dict(leaves, sep="/")
    return Decoder(spec, param_dtype=dtype, compute_dtype=dtype), params


def _optimizer(case: Case) -> optax.GradientTransformation:
    return train_optimizer.optimizer(_OPTIM, case.steps)


def _temp_bytes(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes
