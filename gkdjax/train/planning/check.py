"""Whether the devices that are there can hold a run, said before its weights are read."""

import os
from collections.abc import Iterable

import jax
from absl import logging

from gkdjax.train.planning import memory
from gkdjax.train.planning.setup import PlanInputs, read_weights
from gkdjax.train.setup import RunInputs
from gkdjax.utils.errors import UserError
from gkdjax.utils.text import size

# The others hand out more than the limit that they tell.
_STRICT_ALLOCATORS = (None, "", "default", "bfc")


def check_memory(rows: RunInputs) -> None:
    """Refuses what cannot fit for certain, and warns of what may not.

    Raises:
      UserError: with the plan: the parameters with their optimizer are larger than a device.
    """
    limit = memory_limit(rows.mesh.local_devices)
    if limit is None:
        return
    planned = memory.plan(setup_of(rows))
    if planned.least > limit:
        raise UserError(
            f"this run cannot fit: its weights and their optimizer alone take"
            f" {size(planned.least)} on each device, which has {size(limit)}\n"
            f"{planned.table()}\nWhat helps: python -m gkdjax.tools.plan_memory"
        )
    if planned.peak > limit:
        logging.warning(
            "this run may not fit: about %s on each device, which has %s\n%s",
            size(planned.peak),
            size(limit),
            planned.table(),
        )


def setup_of(rows: RunInputs) -> PlanInputs:
    """Reads the headers of the weights that the run is about to load."""
    sources = rows.sources
    loads = rows.teacher is None and sources.teacher is not None
    return PlanInputs(
        rows.config,
        read_weights(sources.student),
        read_weights(sources.teacher) if loads else None,
        rows.toggles,
        rows.mesh.abstract_mesh,
    )


def memory_limit(devices: Iterable[jax.Device]) -> int | None:
    """Bytes that the smallest of them can hand out; None if one does not say, as a CPU."""
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") not in _STRICT_ALLOCATORS:
        return None
    told = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return None if None in told else min(told)
