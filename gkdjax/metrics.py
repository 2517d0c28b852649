"""A run's numbers, step by step: JSON lines for programs, TensorBoard for eyes.

metrics.jsonl has a line for each optimizer step (from 0), eval.jsonl one for each evaluation on the
way, with the number of steps done before it.
"""

import json
import pathlib
from collections.abc import Sequence

from tensorboardX import SummaryWriter


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


def read_lines(path: pathlib.Path) -> list[dict]:
    """All lines of such a file, in order; [] if there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_lines(path: pathlib.Path, lines: Sequence[dict]) -> None:
    """A whole file of such lines, or none."""
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part.replace(path)


def _drop_from(path: pathlib.Path, step: int) -> None:
    """Keeps whole lines of steps before `step`; a line cut by a crash is not whole."""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] >= step:
            break
        kept.append(line)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(kept))
    part.replace(path)
