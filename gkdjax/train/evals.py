"""Evaluations on the way: when they are due, and what they measure."""

import pathlib

import jax
from absl import logging

from gkdjax.config import Eval
from gkdjax.evaluation.scoring import EvalModel
from gkdjax.models import lora
from gkdjax.train.metrics import MetricsRecorder, MetricsWriter
from gkdjax.train.setup import Run
from gkdjax.types import TrainState
from gkdjax.utils.files import read_lines


def measured_steps(c: Eval, steps: int) -> set[int]:
    """Numbers of steps done at which the student is measured: the first, the last, and between."""
    past = sorted(step for step in c.at_steps if step > steps)
    if past:
        logging.warning("eval.at_steps: the run has %d steps and never gets to %s", steps, past)
    every = range(0, steps, c.every_steps) if c.every_steps else ()
    return {0, steps, *every, *c.at_steps} - set(past)


class EvalSchedule:
    """Evaluates before the first step, at the steps of the schedule and after the last."""

    def __init__(self, parts: Run, workdir: pathlib.Path, first_step: int, measured: set[int]):
        self._parts, self._measured = parts, measured
        # A line is written before its step's checkpoint may be: after a restart it stands.
        first, tensorboard = first_step + 1, parts.inputs.config.log.tensorboard
        self._samples = MetricsWriter(workdir / "samples.jsonl", first, tensorboard=False)
        self._writer = MetricsWriter(workdir / "eval.jsonl", first, tensorboard, group="eval/")
        # As the writers have left them; a step's line of samples is its last.
        self._done = _steps(workdir / "samples.jsonl")
        self._written = _steps(workdir / "eval.jsonl")

    def if_due(self, step: int, state: TrainState, record: MetricsRecorder) -> None:
        """Measures the state that `step` steps have made, if that is to be and was not done yet."""
        if step not in self._measured or step in self._done:
            return
        record.read()
        student = reader(self._parts, state, prefix_bytes=0)
        found = self._parts.evaluation.on_the_way(student)
        if found and step not in self._written:
            self._writer.write(step, found)
        self._samples.write(step, {"answers": self._parts.evaluation.samples(student)})
        record.restart_clock()

    def close(self) -> None:
        self._writer.close()
        self._samples.close()


def _steps(path: pathlib.Path) -> set[int]:
    return {line["step"] for line in read_lines(path)}


def reader(parts: Run, state: TrainState, prefix_bytes: int) -> EvalModel:
    """The student as it would be exported now; merged, so that the base's programs serve again."""
    params = state.trainable
    if parts.frozen is not None:
        places = parts.decoder.layout.shardings_of(parts.frozen)
        params = jax.device_put(lora.merge(parts.frozen, state.trainable), places)
    return EvalModel.of(parts.decoder, params, parts.inputs.sources.chat, prefix_bytes)
