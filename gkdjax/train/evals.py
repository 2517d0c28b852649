"""Measures the student during training, on a schedule."""

import pathlib

import jax
from absl import logging

from gkdjax.config import Eval
from gkdjax.evaluation.scoring import EvalModel
from gkdjax.models import lora
from gkdjax.train.metrics import MetricsRecorder, MetricsWriter
from gkdjax.train.setup import Run
from gkdjax.types import TrainState


def measured_steps(c: Eval, steps: int) -> set[int]:
    """Returns the numbers of steps done after which the student is measured."""
    past = sorted(step for step in c.at_steps if step > steps)
    if past:
        logging.warning("eval.at_steps: the run has %d steps and never gets to %s", steps, past)
    every = range(0, steps, c.every_steps) if c.every_steps else ()
    return {0, steps, *every, *c.at_steps} - set(past)


class EvalSchedule:
    """Evaluates before the first step, at the steps of the schedule and after the last."""

    def __init__(self, run: Run, workdir: pathlib.Path, first_step: int, measured: set[int]):
        self._run, self._measured = run, measured
        samples, evals = workdir / "samples.jsonl", workdir / "eval.jsonl"
        # A line is written before its step's checkpoint may be: after a restart it stands.
        first, tensorboard = first_step + 1, run.inputs.config.log.tensorboard
        self._samples = MetricsWriter(samples, first, tensorboard=False)
        self._writer = MetricsWriter(evals, first, tensorboard, group="eval/")
        # Samples are the last lines of a step: it is done once they are there.
        self._done, self._written = self._samples.steps, self._writer.steps
        for path, steps in ((samples, self._done), (evals, self._written)):
            lost = sorted(step for step in measured - steps if step < first_step)
            if lost and path.exists():
                logging.warning("%s lacks the steps %s, which were measured", path.name, lost)

    def if_due(self, step: int, state: TrainState, record: MetricsRecorder) -> None:
        """Measures the state after `step` steps, if the schedule says so and it is not done yet."""
        if step not in self._measured or step in self._done:
            return
        record.read()
        student = eval_model(self._run, state, prefix_bytes=0)
        found = self._run.evaluation.on_the_way(student)
        if found and step not in self._written:
            self._writer.write(step, found)
        self._samples.write(step, {"answers": self._run.evaluation.samples(student)})
        record.restart_clock()

    def close(self) -> None:
        self._writer.close()
        self._samples.close()


def eval_model(run: Run, state: TrainState, prefix_bytes: int) -> EvalModel:
    """Merges the student's adapters, so that it runs the programs compiled for the base."""
    params = state.trainable
    if run.frozen is not None:
        places = run.decoder.layout.shardings_of(run.frozen)
        params = jax.jit(lora.merge, out_shardings=places)(run.frozen, state.trainable)
    return EvalModel.of(run.decoder, params, run.inputs.sources.chat, prefix_bytes)
