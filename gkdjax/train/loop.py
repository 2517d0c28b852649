"""The steps of a run, from the newest checkpoint to the last one."""

import contextlib
import math
import pathlib
import signal
import threading
import zlib
from collections.abc import Callable

import jax
import numpy as np
from absl import logging

from gkdjax.parallel import multihost
from gkdjax.report import results
from gkdjax.teachers.base import hooks
from gkdjax.train import bad_steps, setup
from gkdjax.train import batches as train_batches
from gkdjax.train import optimizer as train_optimizer
from gkdjax.train.batches import BatchPrefetcher, TrainBatch
from gkdjax.train.checkpoint import Checkpoints
from gkdjax.train.evals import EvalSchedule, measured_steps
from gkdjax.train.metrics import MetricsRecorder
from gkdjax.train.setup import Run, initial_state
from gkdjax.train.step import make_loss, make_train_step
from gkdjax.types import Batch, TrainState
from gkdjax.utils.errors import (
    GkdjaxError,
    Preempted,
    TeacherUnreachable,
    TrainingFailure,
    UserError,
    WrongAnswer,
)
from gkdjax.utils.files import read_lines

# While the teacher is asked; a store on a full disk is a UserError.
_TEACHER_FAILS = (TeacherUnreachable, UserError, WrongAnswer, Preempted)


def train(parts: Run, workdir: pathlib.Path, shared: pathlib.Path) -> tuple[TrainState, dict]:
    """From the newest checkpoint, or from the start, to the last step."""
    config = parts.inputs.config
    steps = setup.total_steps(config, len(parts.inputs.feed))
    optimizer = train_optimizer.optimizer(config.optim, steps)
    schedule = train_optimizer.schedule(config.optim, steps)
    step_function = make_train_step(parts.decoder, optimizer, schedule, config, parts.inputs.mesh)
    require_good = _require_good(parts)
    measured = measured_steps(config.eval, steps)
    kept = measured if config.checkpoint.keep_evaluated else set()
    checkpoints = Checkpoints(shared, config.checkpoint.max_to_keep, sorted(kept))
    state = initial_state(parts, optimizer)
    restored = checkpoints.restore(state)
    if restored is not None:
        state = restored
        logging.info("continuing from step %d", int(state.step))
    first = int(state.step)
    if not parts.keeps_base and parts.frozen is None:
        parts.base = None  # a full fine-tuning that nobody compares with its start
    text = train_batches.BatchSource(parts, workdir, first, steps)
    batches, stopping = BatchPrefetcher(parts, text, steps), multihost.Stopping(parts.inputs.mesh)

    with (
        contextlib.closing(checkpoints),
        contextlib.closing(MetricsRecorder(workdir, first, steps, config)) as record,
        contextlib.closing(EvalSchedule(parts, workdir, first, measured)) as evaluate,
        _stop_signal() as stop,
    ):
        hooks(parts.teacher).stop_on(stop)
        for step in range(first, steps):
            with _saved_if_the_teacher_fails(step, first, steps, state, record, checkpoints):
                evaluate.if_due(step, state, record)
                ready = batches.take(step, state)
            drawn = ready.drawn
            state, sums = step_function(
                state, parts.frozen, *ready[:3], divergence=drawn.divergence
            )
            tokens = int(drawn.batch.student_mask_BS.sum())
            counts = drawn.counts | {"tokens": tokens, "batch_crc32": _crc32(drawn.batch)}
            record.record(step, sums, ready, counts)
            last = step + 1 == steps
            due = (step + 1) % config.checkpoint.every_steps == 0 or step + 1 in kept
            stopped = stopping.asked(stop.is_set())
            if last or due or stopped:
                record.read()
                if last:
                    record.require_some_good(steps)
                require_good(state, record.good)
                checkpoints.save(state)
            if stopped and not last:
                checkpoints.wait()
                raise Preempted(f"stopped by SIGTERM, saved at step {step + 1}; run again")
        checkpoints.wait()
        with told_if_the_teacher_fails("All steps are made and saved"):
            evaluate.if_due(steps, state, record)
    found = results.training(read_lines(workdir / "metrics.jsonl")) | {"steps": steps}
    if bad := [line["step"] for line in read_lines(workdir / bad_steps.LINES)]:
        found["bad_steps"] = bad
    return state, found


def _require_good(parts: Run) -> Callable[[TrainState, TrainBatch | None], None]:
    """Makes a function that raises TrainingFailure where the loss of a state is not finite.

    The numbers of a step are those of the state before it; what is saved is the state after it.
    """
    loss = make_loss(parts.decoder, parts.inputs.config, parts.inputs.mesh)

    def require(state: TrainState, ready: TrainBatch | None) -> None:
        if ready is None:  # no step has changed it since it was checked
            return
        found = float(
            loss(state.trainable, parts.frozen, *ready[:3], divergence=ready.drawn.divergence)
        )
        if not math.isfinite(found):
            raise TrainingFailure(
                f"after step {int(state.step) - 1} the loss is {found}, so the state is not saved"
            )

    return require


def _crc32(batch: Batch) -> int:
    """A fingerprint of a batch: two runs whose text or order differs show where it begins."""
    found = 0
    for leaf in jax.tree.leaves(batch):
        found = zlib.crc32(np.ascontiguousarray(leaf), found)
    return found


@contextlib.contextmanager
def told_if_the_teacher_fails(how_far: str):
    """Where there is nothing to save."""
    try:
        yield
    except _TEACHER_FAILS as error:
        raise type(error)(f"{error}. {how_far}{_goes_on(error)}") from None


def _goes_on(error: GkdjaxError) -> str:
    """The end of a sentence; a UserError is to be mended first, and that may be in the config."""
    return "" if isinstance(error, UserError) else "; the same command goes on from there"


@contextlib.contextmanager
def _saved_if_the_teacher_fails(
    step: int,
    first: int,
    steps: int,
    state: TrainState,
    record: MetricsRecorder,
    checkpoints: Checkpoints,
):
    """Nothing that was learnt is lost with a server: the steps before `step` are saved."""
    try:
        yield
    except _TEACHER_FAILS as error:
        record.read()
        if step > first:
            checkpoints.save(state)
            checkpoints.wait()
        saved = f", and is saved{_goes_on(error)}" if step else ""
        raise type(error)(f"{error}. The run got to step {step} of {steps}{saved}") from None


@contextlib.contextmanager
def _stop_signal():
    """An event that SIGTERM sets; the old handler is back afterwards."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # Python delivers signals to the main thread alone
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
