"""Writes a run's numbers, step by step: JSON lines for programs, TensorBoard for people.

metrics.jsonl has a line for each optimizer step (from 0), eval.jsonl a line for each evaluation,
with the number of steps done before it.
"""

import math
import pathlib
import time
from collections.abc import Callable

import jax
import jax.monitoring
from absl import logging
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from gkdjax.config import Config
from gkdjax.report import run_files
from gkdjax.train import bad_steps
from gkdjax.train.step import TrainBatch
from gkdjax.types import TrainState
from gkdjax.utils import files, text
from gkdjax.utils.errors import TrainingFailure

# The root mean square of an update's numbers; AdamW's is about the learning rate.
LARGEST_UPDATE = 1.0
_FLUSHED_EVERY_S = 30.0  # TensorBoard's files


class MetricsWriter:
    """Appends a line for each step; a resumed run first drops the lines past its checkpoint."""

    def __init__(self, path: pathlib.Path, first_step: int, tensorboard: bool, group: str = ""):
        """Opens `path`, and TensorBoard files beside it, for steps from `first_step` on.

        `group` is put before the names in TensorBoard, as "eval/".
        """
        self.steps = run_files.keep_lines_before(path, first_step)  # that it has already
        self._path, self._group, self._events = path, group, None
        self._directory, self._flushed = path.parent / "tensorboard", time.monotonic()
        if tensorboard:
            # Not its SummaryWriter: on a full disk its thread ends, and then the run waits forever
            # for somebody to take what it writes.
            with files.writing(self._directory):
                self._directory.mkdir(exist_ok=True)
                self._events = EventsWriter(str(self._directory / "events"), f".{path.stem}")
            # TensorBoard leaves out what an earlier start wrote of these steps.
            self._add(first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: dict) -> None:
        """Writes the numbers of a step; the values of a name have one type."""
        files.append_line(self._path, {"step": step, **values})
        if self._events is not None:
            numbers = [
                Summary.Value(tag=self._group + name, simple_value=value)
                for name, value in values.items()
                if not isinstance(value, str)
            ]
            self._add(step, summary=Summary(value=numbers))

    def close(self) -> None:
        if self._events is not None:
            with files.writing(self._directory):
                self._events.close()

    def _add(self, step: int, **what) -> None:
        with files.writing(self._directory):
            self._events.write_event(Event(step=step, wall_time=time.time(), **what))
            if time.monotonic() > self._flushed + _FLUSHED_EVERY_S:
                self._events.flush()
                self._flushed = time.monotonic()


class MetricsRecorder:
    """Reads a step's numbers after the next step was dispatched, so that the device never waits."""

    def __init__(
        self,
        workdir: pathlib.Path,
        first_step: int,
        steps: int,
        config: Config,
        loss_of: Callable[[TrainState, TrainBatch], float],
    ):
        """Continues the files of the run at `first_step` of `steps`.

        `loss_of` computes the loss of a state, in nats, on a batch that lies on the host.
        """
        self._workdir, self._max_bad_steps = workdir, config.train.max_bad_steps
        log, self._loss_of = config.log, loss_of
        self._writer = MetricsWriter(workdir / "metrics.jsonl", first_step, log.tensorboard)
        self._bar = text.bar(steps, "train", start=first_step, shown=log.progress_bar)
        self._pending = None
        bad = bad_steps.drop_from(workdir, first_step)
        self._bad = next(n for n in range(first_step + 1) if first_step - 1 - n not in bad)
        if lost := {*range(first_step)} - bad - self._writer.steps:
            logging.warning("metrics.jsonl lacks %d steps before %d", len(lost), first_step)
        # A batch of a good step, on the host: one for all checks, so that they are one program.
        self._good: TrainBatch | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves time and compilations until now out of the next step's."""
        self._clock, self._compiled = time.monotonic(), _compilations

    def record(self, step: int, sums: dict, batch: TrainBatch) -> None:
        """Takes the step's sums, unread, and reads those of the step before."""
        counts = batch.counts() | {"compilations": _compilations - self._compiled}
        self._compiled = _compilations
        self.read()
        if self._good is not None:
            batch = batch.without_dense()
        self._pending = (step, sums, batch, counts)

    def read(self) -> None:
        """Waits for the pending step, checks and writes its numbers.

        Raises:
          TrainingFailure: too many steps in a row were bad, or the update is absurd.
        """
        if self._pending is None:
            return
        (step, sums, batch, counts), self._pending = self._pending, None
        sums = {name: float(value) for name, value in jax.device_get(sums).items()}
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        self._bar.update(1)
        if not sums["good"]:
            self._read_bad(step, sums, batch, counts)
            return
        if not sums["update_rms"] <= LARGEST_UPDATE:
            raise TrainingFailure(
                f"step {step} changed each parameter by {sums['update_rms']:.3g} (root mean"
                f" square), and may by {LARGEST_UPDATE:g} at most; what it made is not saved. Lower"
                " optim.learning_rate"
            )
        self._bad = 0
        if self._good is None:
            self._good = batch.on_host()
        values = {
            "loss": sums["loss_sum"] / sums["loss_weight"],
            "divergence": batch.divergence,
            "targets": int(sums["targets"]),
            **counts,
            "tokens_per_second": counts["tokens"] / seconds,
            **{name: sums[name] for name in ("grad_norm", "update_rms", "learning_rate")},
        }
        for name in batch.anchors:
            values[f"{name}_loss"] = sums[f"{name}_sum"] / sums[f"{name}_weight"]
        self._writer.write(step, values)
        speed = f"{values['tokens_per_second']:.0f}"
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", tokens_s=speed)

    def check(self, state: TrainState) -> None:
        """Reads the pending step, and requires a finite loss of the state that it made.

        The numbers of a step are those of the state before it.

        Raises:
          TrainingFailure: as `read`, or the loss of the state is not finite.
        """
        self.read()
        if self._good is None:  # nothing has changed the state since it was checked
            return
        loss = self._loss_of(state, self._good)
        if not math.isfinite(loss):
            raise TrainingFailure(
                f"after step {int(state.step) - 1} the loss is {loss}, so the state is not saved"
            )

    def _read_bad(self, step: int, sums: dict, batch: TrainBatch, counts: dict) -> None:
        reason = bad_steps.reason(sums)
        bad_steps.write(self._workdir, step, reason, batch)
        names = batch.names["loss"]
        rows = f"{len(names)} rows ({text.some(names)})"
        if counts["dropped_rows"]:
            rows += f", of {counts['dropped_rows']} of which no response was accepted"
        replay = f"python -m gkdjax.tools.replay_batch {self._workdir} --step={step}"
        self._bad += 1
        logging.warning("step %d changed nothing: %s; %s. %s", step, reason, rows, replay)
        if self._bad >= self._max_bad_steps:
            raise TrainingFailure(
                f"{self._bad} steps in a row, up to step {step}, changed nothing"
                f" (train.max_bad_steps = {self._max_bad_steps}): {reason}; {rows}. {replay}"
                " computes the batch again, row by row"
            )

    def require_some_good(self, steps: int) -> None:
        """Raises TrainingFailure if none of the run's steps has changed anything."""
        if self._bad >= steps:
            raise TrainingFailure(
                f"none of the {steps} steps changed anything, see {bad_steps.LINES}"
            )

    def close(self) -> None:
        self._writer.close()
        self._bar.close()


_compilations = 0  # programs compiled (or read from the persistent cache) since the import


def _count_compilation(event: str, duration: float, **details) -> None:
    del duration, details
    global _compilations
    _compilations += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count_compilation)
