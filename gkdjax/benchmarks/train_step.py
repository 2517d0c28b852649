"""One optimizer step, fused heads against [tokens, vocabulary] logits: seconds and memory.

    python -m gkdjax.benchmarks.train_step [--vocab 32768] [--variants unfused dense] [--out FILE]

Every measurement has a process of its own, because peak memory is per process. All variants make
the same step of the same random models on the same batch:

- "unfused": a reference that is written here, as one would without this package's heads: both
  models' logits [B,N,V], `losses.forward_kl`, the gradient by autodiff.
- "plain": the same with the KL of a textbook, which does not provide for logits of -inf and lets
  small divergences drown in rounding: what an unfused step costs at least.
- "dense": `make_train_step` against `DenseTargets` that a `LocalTeacher` makes anew in each step.
- "topk": the same with `TopKTargets`.
- "stored": `TopKTargets` made once, before; no teacher is there any more.
"""

import argparse
import functools
import gc
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gkdjax import config, losses
from gkdjax.benchmarks import harness
from gkdjax.benchmarks.models import STUDENTS, TEACHERS, decoder_spec, random_batch, random_model
from gkdjax.models import lora
from gkdjax.models.decoder import Decoder
from gkdjax.models.prefix_cache import predicting_hidden
from gkdjax.parallel.mesh import make_mesh, replicate, shard_rows
from gkdjax.teachers.local import LocalTeacher
from gkdjax.train import optimizer as train_optimizer
from gkdjax.train.step import init_state, make_train_step
from gkdjax.types import Batch, TrainState
from gkdjax.utils.text import table

UNFUSED, PLAIN = "unfused", "plain"
VARIANTS = (UNFUSED, "dense", "topk", "stored")
TUNINGS, PROMPTS = ("lora", "full"), ("none", "half")
# Left out unless it is named: at this size full fine-tuning takes minutes, and its half of prompts
# shows nothing that the other combinations do not.
_LEFT_OUT = {(262_144, "full", "half")}
_DIVERGENCE = "forward_kl"
# Dropout would need keys that the reference step does not have.
_LORA = config.Lora(rank=64, alpha=128.0, dropout=0.0)
_OPTIM = config.Optim(schedule="constant", warmup_ratio=0.0)


class Case(NamedTuple):
    """Which step of which models one process measures."""

    vocab: int  # V of both models
    tuning: str  # "lora" (rank 64, all kernels, base frozen) or "full"
    prompts: str  # "none": each position predicts a target; "half": only the second half does
    variant: str


def main() -> None:
    a = parse(sys.argv[1:])
    if a.worker:
        (case,) = plan(a)
        print(json.dumps(measure(case, a)))
        return
    with tempfile.TemporaryDirectory() as cache:
        cases = {case: functools.partial(_in_new_process, case, cache) for case in plan(a)}
        results = harness.rounds(cases, a.rounds, a.out)
    print(summary(results, a.rows * a.length))
    print(next(iter(results.values()))[0]["where"])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("train_step", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--vocab", type=int, nargs="+", default=[32_768, 262_144], help="Vocabulary sizes.")
    add("--variants", nargs="+", choices=(*VARIANTS, PLAIN), default=VARIANTS)
    add("--tuning", nargs="+", choices=TUNINGS)
    add("--prompts", nargs="+", choices=PROMPTS)
    add("--rounds", type=int, default=3, help="How often each case is measured.")
    add("--steps", type=int, default=2, help="Timed steps of a measurement.")
    add("--rows", type=int, default=4, help="Rows of the batch.")
    add("--length", type=int, default=256, help="Positions of a row.")
    add("--top_k", type=int, default=64, help="K of the steps topk and stored.")
    add("--chunk_size", type=int, default=512, help="The config's gkd.chunk_size.")
    add("--student", choices=STUDENTS, default="small", help="Its shape.")
    add("--teacher", choices=TEACHERS, default="small", help="Its shape.")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--out", help="A JSON file for every single measurement.")
    add("--worker", action="store_true", help="Measure one case in this process.")
    return parser.parse_args(arguments)


def plan(a: argparse.Namespace) -> list[Case]:
    """The cases of one round, those of one setting next to each other."""
    settings = itertools.product(a.vocab, a.tuning or TUNINGS, a.prompts or PROMPTS)
    return [
        Case(*setting, variant)
        for setting in settings
        if a.tuning or a.prompts or setting not in _LEFT_OUT
        for variant in a.variants
    ]


def _in_new_process(case: Case, cache: str) -> dict:
    """`measure` in a process; `cache` keeps compiled programs for the next round."""
    names = ("vocab", "tuning", "prompts", "variants")
    flags = [f"--{name}={value}" for name, value in zip(names, case, strict=True)]
    compile_cache = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    arguments = (*sys.argv[1:], *flags, "--worker")
    return harness.in_new_process("gkdjax.benchmarks.train_step", *arguments, **compile_cache)


def summary(results: harness.Results, tokens: int) -> str:
    """A row a case of so many tokens; ratios to the same round's "unfused", if it was measured."""
    rows = []
    for case, found in results.items():
        reference = results.get(case._replace(variant=UNFUSED))
        seconds, memory = harness.median(found), ("peak_bytes", "temp_bytes")
        shares = ["-"] * 3
        if reference is not None:
            shares = [f"{harness.median(reference, over=found):.2f}"]
            keys = ("cpu_seconds", "peak_bytes")
            shares += [f"{harness.median(found, key, over=reference):.2f}" for key in keys]
        rows.append(
            [
                *(f"{case.vocab:,}", *case[1:]),
                *(f"{seconds:.2f}", f"{harness.median(found, 'cpu_seconds'):.2f}"),
                f"{tokens / seconds:,.0f}",
                *(f"{harness.median(found, key) / harness.GIB:.2f}" for key in memory),
                *shares,
            ]
        )
    header = ["V", "tuning", "prompts", "step", "s", "CPU s", "tokens/s", "peak GiB", "temp GiB"]
    header += ["times as fast", "of its CPU s", "of its peak"]
    return table(header, rows, left=4)


def measure(case: Case, a: argparse.Namespace) -> dict:
    """Compiles, takes one step to warm up and `a.steps` timed ones, in a process that is new.

    Returns:
      seconds and cpu_seconds, the medians of a step; losses, mean nats a target of every step;
      temp_bytes; peak_bytes since the step was compiled, `memory` says of what; and `where`.
    """
    step, state, temp_bytes = prepare(case, a)
    gc.collect()
    harness.forget_peak()
    losses = []

    def take_step():
        nonlocal state
        state, sums = jax.block_until_ready(step(state))
        losses.append(float(sums["loss_sum"]) / float(sums["targets"]))

    take_step()
    found = harness.timed(take_step, a.steps)
    memory, most = harness.peak_bytes()
    found |= {"losses": losses, "temp_bytes": temp_bytes, "peak_bytes": most, "memory": memory}
    return found | {"where": harness.where()}


def prepare(case: Case, a: argparse.Namespace) -> tuple[Callable, TrainState, int]:
    """(step(state) -> (state, sums), which donates the state; the first state; scratch bytes)."""
    mesh = make_mesh(devices=jax.local_devices()[:1])  # the reference step knows no other
    prompt = {"none": 0, "half": a.length // 2}[case.prompts]
    batch = shard_rows(mesh, random_batch(0, case.vocab, a.rows, a.length, prompt, a.length))
    decoder, params = random_model(decoder_spec(STUDENTS[a.student], case.vocab), a.dtype)
    optimizer = train_optimizer.optimizer(_OPTIM, a.steps)
    if case.tuning == "lora":
        frozen, trainable = params, lora.init(jax.random.key(0), params, _LORA)
    else:
        frozen, trainable = None, jax.tree.map(lambda x: x.astype(jnp.float32), params)
    state, frozen = replicate(mesh, (init_state(trainable, optimizer), frozen))
    teacher = random_model(decoder_spec(TEACHERS[a.teacher], case.vocab), a.dtype, seed=1)
    if case.variant in _UNFUSED_KL:
        step = unfused_step(decoder, teacher[0], optimizer, _UNFUSED_KL[case.variant])
        targets = _always(replicate(mesh, teacher[1]))
    else:
        gkd = config.Gkd(divergence=_DIVERGENCE, chunk_size=a.chunk_size)
        schedule = train_optimizer.schedule(_OPTIM, a.steps)
        step = make_train_step(decoder, optimizer, schedule, config.Config(gkd=gkd), mesh)
        targets = _teacher_targets(case, a, *teacher, mesh, batch)
    del teacher, params, trainable  # a store needs no teacher: its weights shall not count
    compiled = step.lower(state, frozen, batch, targets(), {}, divergence=_DIVERGENCE).compile()
    size = compiled.memory_analysis().temp_size_in_bytes
    return lambda state: compiled(state, frozen, batch, targets(), {}), state, size


def _teacher_targets(case: Case, a, decoder: Decoder, params: dict, mesh, batch) -> Callable:
    teacher = LocalTeacher(
        decoder,
        replicate(mesh, params),
        chat=None,  # only renders views, and the batch is there
        description="random weights",
        top_k=None if case.variant == "dense" else a.top_k,
        temperature=1.0,
        vocab_size=case.vocab,
        lengths=(a.length,),
        batch_size=a.rows,
        chunk_size=a.chunk_size,
        mesh=mesh,
        prefix_bytes=0,
    )
    if case.variant == "stored":
        return _always(jax.block_until_ready(teacher.targets(batch)))
    return functools.partial(teacher.targets, batch)


def _always(value) -> Callable:
    return lambda: value


def _plain_kl(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    log_q, log_p = jax.nn.log_softmax(student_logits), jax.nn.log_softmax(teacher_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


_UNFUSED_KL = {UNFUSED: losses.forward_kl, PLAIN: _plain_kl}


def unfused_step(decoder: Decoder, teacher: Decoder, optimizer, forward_kl: Callable) -> Callable:
    """`make_train_step`'s update, with the teacher's parameters in place of targets.

    The predicting positions are gathered before the head here too: what it is compared with shall
    not win by that.
    """

    def logits(decoder, params, *view):
        hidden_BND = predicting_hidden(decoder, params, *view)
        return decoder.apply({"params": params}, hidden_BND, method="unembed")

    def step(state: TrainState, frozen, batch: Batch, teacher_params, anchors, *, divergence):
        view = batch.teacher_tokens_BT, batch.teacher_mask_BT, batch.teacher_at_BN
        teacher_BNV = jax.lax.stop_gradient(logits(teacher, teacher_params, *view))
        count = losses.masked_count(batch.target_mask_BN)

        def objective(trainable):
            view = batch.student_tokens_BS, batch.student_mask_BS, batch.student_at_BN
            student_BNV = logits(decoder, lora.student_params(frozen, trainable), *view)
            each_BN = forward_kl(student_BNV, teacher_BNV)
            summed = losses.masked_sum(each_BN, batch.target_mask_BN)
            return summed / count, summed

        grads, summed = jax.grad(objective, has_aux=True)(state.trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        sums = {"loss_sum": summed, "targets": count}
        return TrainState(state.step + 1, trainable, opt_state), sums

    return jax.jit(step, donate_argnames="state", static_argnames="divergence")


if __name__ == "__main__":
    main()
