"""Checks before weights are read whether the devices can hold a run."""

import os
import pathlib
from collections.abc import Iterable

import jax
from absl import logging
from etils import epath

from gkdjax.parallel import multihost
from gkdjax.train.checkpoint import saved_steps
from gkdjax.train.evals import measured_steps
from gkdjax.train.planning import memory
from gkdjax.train.planning.setup import PlanInputs, read_weights
from gkdjax.train.setup import RunInputs
from gkdjax.utils import files, remote
from gkdjax.utils.errors import UserError
from gkdjax.utils.text import size


def check_memory(inputs: RunInputs) -> None:
    """Warns of a run that may not fit.

    Raises:
      UserError: with the plan: weights and optimizer alone are larger than a device.
    """
    limit = memory_limit(inputs.mesh.local_devices)
    if limit is None:
        return
    planned = memory.plan(plan_inputs(inputs))
    if planned.least > limit:
        raise UserError(
            f"this run cannot fit: its weights and their optimizer alone take"
            f" {size(planned.least)} on each device, which has {size(limit)}\n"
            f"{planned.table()}\nWhat helps: python -m gkdjax.tools.plan_memory"
        )
    if planned.peak > limit:
        logging.warning(
            "this run may not fit: about %s on each device, which has %s\n%s",
            *(size(planned.peak), size(limit), planned.table()),
        )


def check_disk(inputs: RunInputs, run: pathlib.Path | epath.Path, steps: int) -> None:
    """Warns of checkpoints and an export of a run of `steps` that may not fit into its directory.

    Raises:
      NotWritten: not even one checkpoint fits.
    """
    planned, config, saved = plan_inputs(inputs), inputs.config, saved_steps(run)
    if saved[-1:] == [steps] or not multihost.leads() or remote.is_remote(run):
        return
    kept = config.checkpoint.max_to_keep
    if config.checkpoint.keep_evaluated:
        kept += len(measured_steps(config.eval, steps))
    exports = {"merged": planned.student.stored_bytes, "adapter": planned.trained_bytes}
    exports["both"] = sum(exports.values())
    one = 3 * planned.trained_bytes  # with two moments of each parameter
    wanted = one * max(kept + 1 - len(saved), 1) + exports[config.train.export]
    files.require_room(run, "a checkpoint", one, wanted)


def plan_inputs(inputs: RunInputs) -> PlanInputs:
    """Reads the headers of the weights that the run is about to load."""
    sources, teacher = inputs.sources, None
    if inputs.teacher is None and sources.teacher is not None:
        teacher = read_weights(sources.teacher)
    student, mesh = read_weights(sources.student), inputs.mesh.abstract_mesh
    return PlanInputs(inputs.config, student, teacher, inputs.toggles, mesh)


def memory_limit(devices: Iterable[jax.Device]) -> int | None:
    """Returns the fewest bytes that a device has to give; None where one does not say (a CPU)."""
    # Other allocators give more than the limit that they name.
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") not in (None, "", "default", "bfc"):
        return None
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return None if None in limits else min(limits)
