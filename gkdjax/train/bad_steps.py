"""Records steps that changed nothing, because a loss or the gradient was not finite.

RUN/bad_steps.jsonl has a line for each, and RUN/bad_steps/STEP.safetensors its batches with the top
k of a teacher, from which `gkdjax.tools.replay_batch` finds the rows.
"""

import json
import math
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from gkdjax.losses.objective import TopKTargets
from gkdjax.losses.topk import TopKLogprobs
from gkdjax.parallel import mesh
from gkdjax.report import run_files
from gkdjax.train.step import TrainBatch
from gkdjax.types import Batch
from gkdjax.utils import files, tree
from gkdjax.utils.errors import UserError

LINES = "bad_steps.jsonl"


class BadPart(NamedTuple):
    """A batch of a bad step, in NumPy."""

    names: list[str]  # of its rows
    batch: Batch
    targets: TopKTargets | None  # None: the teacher's whole vocabulary, which is computed again


def reason(sums: dict[str, float]) -> str:
    """Says why the step with these sums was bad."""
    if sums["targets"] == 0:
        return (
            "the batch has no target token (raise train.batch_size or rollout.max_retries, or let"
            " the student learn off-policy first, gkd.on_policy_warmup_steps)"
        )
    for name in (key.removesuffix("_sum") for key in sums if key.endswith("_sum")):
        loss = sums[f"{name}_sum"] / sums[f"{name}_weight"] if sums[f"{name}_weight"] else math.nan
        if not math.isfinite(loss):
            return f"{'the loss' if name == 'loss' else f'the loss of {name}'} is {loss}"
    return f"the norm of the gradient is {sums['grad_norm']}"


def write(workdir: pathlib.Path, step: int, why: str, batch: TrainBatch) -> None:
    """Writes the step's file and line; all processes call it, each for its own directory."""
    leaves = {}
    for name, (rows, targets) in ({"loss": (batch.batch, batch.targets)} | batch.anchors).items():
        leaves |= _leaves(f"{name}/batch/", rows)
        if isinstance(targets, TopKTargets):
            leaves |= _leaves(f"{name}/targets/", targets)
            shared = -1 if targets.shared is None else targets.shared
            leaves[f"{name}/targets/shared"] = np.asarray(shared, np.int64)
            temperature = np.asarray(targets.topk.temperature, np.float64)
            leaves[f"{name}/targets/temperature"] = temperature
    line = {"step": step, "reason": why, "divergence": batch.divergence, "rows": batch.names}
    path = _path(workdir, step)
    with files.writing(path):
        path.parent.mkdir(exist_ok=True)
    # Not the library's own file, which raises no OSError.
    files.write_bytes(path, safetensors.numpy.save(leaves, {"line": json.dumps(line)}))
    files.append_line(workdir / LINES, line)


_OF_JSON = TypeError, AttributeError, LookupError, ValueError, RecursionError


def read(workdir: pathlib.Path, step: int) -> tuple[dict, dict[str, BadPart]]:
    """Reads the line of a bad step, and its batches by name: "loss" and those of the anchors.

    Raises:
      UserError: the run has no such step, or its file cannot be read.
    """
    path = _path(workdir, step)
    if not path.is_file():
        steps = sorted(int(file.stem) for file in _files(workdir))
        raise UserError(f"{workdir} has no bad step {step}; there are {steps}")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            line = json.loads(file.metadata()["line"])
            leaves = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        parts = {}
        for name, rows in line["rows"].items():
            batch, found = (_under(leaves, f"{name}/{what}/") for what in ("batch", "targets"))
            parts[name] = BadPart(rows, Batch(**batch), _topk(found) if found else None)
    except (safetensors.SafetensorError, OSError, *_OF_JSON) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return line, parts


def drop_from(workdir: pathlib.Path, step: int) -> set[int]:
    """Removes the lines and files of `step` and later ones, which are made again -> those before.

    Raises UserError for a damaged line before them.
    """
    for path in _files(workdir):
        if int(path.stem) >= step:
            path.unlink()
    return run_files.keep_lines_before(workdir / LINES, step)


def _files(workdir: pathlib.Path) -> list[pathlib.Path]:
    found = (workdir / "bad_steps").glob("*.safetensors")
    return [path for path in found if path.stem.isdecimal()]


def _path(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return workdir / "bad_steps" / f"{step}.safetensors"


def _leaves(prefix: str, of: Batch | TopKTargets) -> dict[str, np.ndarray]:
    flat, _ = jax.tree_util.tree_flatten_with_path(mesh.fetch(of))
    return {prefix + tree.path_str(path): np.ascontiguousarray(leaf) for path, leaf in flat}


def _under(leaves: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): leaf for k, leaf in leaves.items() if k.startswith(prefix)}


def _topk(found: dict[str, np.ndarray]) -> TopKTargets:
    arrays = (found.get(f"topk/{name}") for name in ("ids", "logprobs", "tail_logprob"))
    topk = TopKLogprobs(*arrays, temperature=float(found["temperature"]))
    shared = int(found["shared"])
    return TopKTargets(topk, found["target_logprob_BN"], None if shared < 0 else shared)
