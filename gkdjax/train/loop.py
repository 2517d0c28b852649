"""The steps of a run, from the newest checkpoint to the last step."""

import contextlib
from collections.abc import Callable

import jax
import numpy as np
from absl import logging

from gkdjax.parallel import multihost
from gkdjax.report import results
from gkdjax.teachers.base import hooks
from gkdjax.train import bad_steps
from gkdjax.train import optimizer as train_optimizer
from gkdjax.train.batches import BatchPrefetcher
from gkdjax.train.checkpoint import Checkpoints
from gkdjax.train.evals import EvalSchedule, measured_steps
from gkdjax.train.metrics import MetricsRecorder
from gkdjax.train.places import Places
from gkdjax.train.setup import Run, initial_state, total_steps
from gkdjax.train.step import TrainBatch, make_loss, make_train_step
from gkdjax.train.stopping import StopRequest
from gkdjax.train.watchdog import Watchdog
from gkdjax.types import TrainState
from gkdjax.utils.errors import (
    NotWritten,
    Preempted,
    TeacherUnreachable,
    UserError,
    WrongAnswer,
)
from gkdjax.utils.files import read_lines


def train(run: Run, places: Places, stop: StopRequest) -> tuple[TrainState, dict]:
    """Trains to the last step -> (state, what results.json has of the steps)."""
    config, workdir = run.inputs.config, places.own
    steps = total_steps(config, len(run.inputs.dataset))
    optimizer = train_optimizer.optimizer(config.optim, steps)
    schedule = train_optimizer.schedule(config.optim, steps)
    train_step = make_train_step(run.decoder, optimizer, schedule, config, run.inputs.mesh)
    measured = measured_steps(config.eval, steps)
    kept = measured if config.checkpoint.keep_evaluated else set()
    checkpoints = Checkpoints(places.run, config.checkpoint.max_to_keep, sorted(kept), places.keep)
    state = initial_state(run, optimizer)
    state = checkpoints.restore(state) or state
    first = int(state.step)
    if first:
        logging.info("continuing from step %d", first)
    if not run.keeps_base and run.frozen is None:
        run.base = None  # a full fine-tuning that nothing compares with its start
    batches = BatchPrefetcher(run, workdir, first, steps)
    flags = multihost.Flags(run.inputs.mesh)

    with (
        contextlib.closing(checkpoints),
        contextlib.closing(MetricsRecorder(workdir, first, steps, config, _loss_of(run))) as record,
        contextlib.closing(EvalSchedule(run, workdir, first, measured)) as evaluate,
        contextlib.closing(Watchdog(config.train.watchdog_s)) as watchdog,
        stop.deferred(),
    ):
        hooks(run.teacher).stop_on(stop.event)
        for step in range(first, steps):
            try:
                with stop.raising():
                    evaluate.if_due(step, state, record)
                batch = batches.take(step, state)
            except TEACHER_FAILS as error:
                if isinstance(error, NotWritten) and jax.process_count() > 1:
                    raise  # by this process alone: the others would not come to save with it
                if step > first:
                    record.check(state)
                    checkpoints.save(state)
                    checkpoints.wait()
                if isinstance(error, Preempted) and stop.event.is_set():
                    how_far = f"saved at step {step}" if step else "before its first step"
                    raise stop.error(how_far) from None
                saved = f", and is saved{_advice(error)}" if step else ""
                how_far = f"The run got to step {step} of {steps}{saved}"
                raise type(error)(f"{error}. {how_far}") from None
            last = step + 1 == steps
            due = last or (step + 1) % config.checkpoint.every_steps == 0 or step + 1 in kept
            with watchdog.watching((*map(np.shape, jax.tree.leaves(batch[:3])), due)):
                state, sums = train_step(state, run.frozen, *batch[:3], divergence=batch.divergence)
                record.record(step, sums, batch)
                stopped, failed = flags.any(stop.event.is_set(), checkpoints.failed())
                if due or stopped or failed:
                    record.check(state)
                    if last:
                        record.require_some_good(steps)
                    checkpoints.save(state, due or stopped)
                if stopped and not last:
                    checkpoints.wait()
                    raise stop.error(f"saved at step {step + 1}")
        with watchdog.watching(None):
            checkpoints.wait()
        with message_if_teacher_fails("All steps are made and saved"), stop.raising():
            evaluate.if_due(steps, state, record)
    found = results.training(read_lines(workdir / "metrics.jsonl")) | {"steps": steps}
    if bad := len(read_lines(workdir / bad_steps.LINES)):
        found["bad_steps"] = bad
    return state, found


def _loss_of(run: Run) -> Callable[[TrainState, TrainBatch], float]:
    mesh = run.inputs.mesh
    loss = make_loss(run.decoder, run.inputs.config, mesh)

    def of(state: TrainState, batch: TrainBatch) -> float:
        placed = batch.on_devices(mesh)[:3]
        return float(loss(state.trainable, run.frozen, *placed, divergence=batch.divergence))

    return of


# Raised while the teacher is asked; a store on a full disk is a UserError.
TEACHER_FAILS = (TeacherUnreachable, UserError, WrongAnswer, Preempted)


@contextlib.contextmanager
def message_if_teacher_fails(how_far: str):
    """Adds to such an error how far the run got, where there is nothing to save."""
    try:
        yield
    except TEACHER_FAILS as error:
        raise type(error)(f"{error}. {how_far}{_advice(error)}") from None


def _advice(error: Exception) -> str:
    """Ends a sentence; a UserError has to be mended first, perhaps in the config."""
    return "" if isinstance(error, UserError) else "; the same command goes on from there"
