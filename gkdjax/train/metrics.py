"""A run's numbers, step by step: JSON lines for programs, TensorBoard for eyes.

metrics.jsonl has a line for each optimizer step (from 0), eval.jsonl one for each evaluation on the
way, with the number of steps done before it.
"""

import json
import math
import pathlib
import time

import jax
import jax.monitoring
from tensorboardX import SummaryWriter

from gkdjax.config import Log
from gkdjax.utils import files, text
from gkdjax.utils.errors import TrainingFailure

_COMPILED = "/jax/core/compile/backend_compile_duration"  # one event a program, from jax itself
_seen = 0


class MetricsWriter:
    """Appends one line a step; a resumed run first takes back the lines past its checkpoint."""

    def __init__(self, path: pathlib.Path, first_step: int, tensorboard: bool, group: str = ""):
        """Opens `path`, and its directory's TensorBoard files, for steps from `first_step` on.

        Args:
          group: put before the names in TensorBoard, as "eval/".
        """
        if path.exists():
            _drop_from(path, first_step)
        self._file = path.open("a")
        self._group = group
        self._tensorboard = None
        if tensorboard:
            self._tensorboard = SummaryWriter(
                str(path.parent / "tensorboard"),
                purge_step=first_step,
                write_to_disk=True,
                filename_suffix=f".{path.stem}",
            )

    def write(self, step: int, values: dict) -> None:
        """Writes the numbers of step `step`; a name holds one type for good."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                if not isinstance(value, str):
                    self._tensorboard.add_scalar(self._group + name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _drop_from(path: pathlib.Path, step: int) -> None:
    """Keeps whole lines of steps before `step`; a line cut by a crash is not whole."""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] >= step:
            break
        kept.append(line)
    files.write_text(path, "".join(kept))


class MetricsRecorder:
    """Reads a step's numbers after the next one was dispatched, so that the device never waits."""

    def __init__(self, workdir: pathlib.Path, first_step: int, steps: int, log: Log):
        self._workdir = workdir
        self._writer = MetricsWriter(workdir / "metrics.jsonl", first_step, log.tensorboard)
        self._bar = text.bar(steps, "train", start=first_step, shown=log.progress_bar)
        self._pending = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """What came before belongs to no step: neither its time nor its compilations."""
        self._clock, self._compiled = time.monotonic(), compilations()

    def record(self, step: int, sums: dict, divergence: str, counts: dict) -> None:
        """Takes the step's sums, unread, and reads those of the step before."""
        compiled = compilations()
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
                " train.batch_size or rollout.max_retries, or let the student learn off-policy"
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


def compilations() -> int:
    """Programs compiled (or read from the persistent cache) since this module was imported."""
    return _seen


def _listen(event: str, duration: float, **details) -> None:
    del duration, details
    global _seen
    _seen += event == _COMPILED


jax.monitoring.register_event_duration_secs_listener(_listen)
