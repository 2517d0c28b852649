"""Each optimizer step's numbers: read late, checked, written, shown."""

import math
import pathlib
import time

import jax

from gkdjax import compilations, progress
from gkdjax.config import Log
from gkdjax.errors import TrainingFailure
from gkdjax.metrics import MetricsWriter


class Recorder:
    """Reads a step's numbers after the next one was dispatched, so that the device never waits."""

    def __init__(self, workdir: pathlib.Path, first_step: int, steps: int, log: Log):
        self._workdir = workdir
        self._writer = MetricsWriter(workdir / "metrics.jsonl", first_step, log.tensorboard)
        self._bar = progress.bar(steps, "train", start=first_step, shown=log.progress_bar)
        self._pending = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """What came before belongs to no step: neither its time nor its compilations."""
        self._clock, self._compiled = time.monotonic(), compilations.count()

    def dispatched(self, step: int, sums: dict, divergence: str, counts: dict) -> None:
        """Takes the step's sums, unread, and reads those of the step before."""
        compiled = compilations.count()
        counts = counts | {"compilations": compiled - self._compiled}
        self._compiled = compiled
        self.read()
        self._pending = (step, sums, divergence, counts)

    def read(self) -> None:
        """Waits for the pending step, checks and writes its numbers.

        Raises:
          TrainingFailure: one of them is not finite.
        """
        if self._pending is None:
            return
        (step, sums, divergence, counts), self._pending = self._pending, None
        sums = {name: float(value) for name, value in jax.device_get(sums).items()}
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        if sums["targets"] == 0:
            raise TrainingFailure(
                f"the batch of step {step} has no target token: of {counts['dropped_rows']} rows no"
                " response was accepted (see context.target_content_pattern). Raise"
                " train.batch_size or trajectory.max_refills, or let the student learn off-policy"
                " first (gkd.on_policy_warmup_steps)"
            )
        values = {
            "loss": sums["loss_sum"] / sums["loss_weight"],
            "divergence": divergence,
            "targets": int(sums["targets"]),
            **counts,
            "tokens_per_second": counts["tokens"] / seconds,
            "grad_norm": sums["grad_norm"],
            "learning_rate": sums["learning_rate"],
        }
        for name in (key.removesuffix("_sum") for key in sums if key.endswith("_sum")):
            if name != "loss":
                values[f"{name}_loss"] = sums[f"{name}_sum"] / sums[f"{name}_weight"]
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise TrainingFailure(
                    f"{name} is {value} at step {step}; nothing after the last checkpoint in"
                    f" {self._workdir / 'checkpoints'} is kept. Lower optim.learning_rate or"
                    " max_grad_norm, or look at the batch's rows"
                )
        self._writer.write(step, values)
        self._bar.set_postfix(
            loss=f"{values['loss']:.4f}", tokens_s=f"{values['tokens_per_second']:.0f}"
        )
        self._bar.update(1)

    def close(self) -> None:
        self._writer.close()
        self._bar.close()
