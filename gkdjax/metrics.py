"""A run's numbers, step by step: metrics.jsonl for programs, TensorBoard for eyes."""

import json
import pathlib

from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends one line a step; a resumed run first takes back the lines past its checkpoint."""

    def __init__(self, workdir: pathlib.Path, first_step: int, tensorboard: bool):
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            _drop_from(self._path, first_step)
        self._file = self._path.open("a")
        self._tensorboard = None
        if tensorboard:
            self._tensorboard = SummaryWriter(
                str(workdir / "tensorboard"), purge_step=first_step, write_to_disk=True
            )

    def write(self, step: int, values: dict[str, float | int | str]) -> None:
        """Writes the numbers of optimizer step `step` (from 0); a name holds one type for good."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                if not isinstance(value, str):
                    self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(workdir: pathlib.Path) -> list[dict]:
    """All lines of a run's metrics.jsonl, in order."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


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
