"""The meshes that some devices can form, and the one on which a step takes least time."""

import collections
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from gkdjax import config
from gkdjax.train.planning import collectives, plan
from gkdjax.train.planning.chips import Chip
from gkdjax.train.planning.setup import PlanInputs, on_mesh
from gkdjax.utils.errors import UserError


class Candidate(NamedTuple):
    """A mesh on which a run fits."""

    settings: dict[str, int]  # what to change in the config, by key
    peak: int  # bytes on one device
    seconds: float  # of a step


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was tried."""

    best: Candidate | None
    fitting: int
    tried: int
    refused: dict[str, int]  # what a mesh does not divide -> how many meshes


def says_nothing(mesh: config.Mesh) -> bool:
    """Its sizes are the defaults."""
    default = config.Mesh()
    return (mesh.data, mesh.fsdp, mesh.tensor) == (default.data, default.fsdp, default.tensor)


def choose(setup: PlanInputs, chip: Chip) -> Choice:
    """The least seconds; among equals less "tensor", then less "fsdp".

    Args:
      setup: with the slices that the config names.
      chip: whose numbers are known.
    """
    fitting, tried, refused = [], 0, collections.Counter()
    for sizes in _sizes(setup.mesh.size // setup.slices):
        tried += 1
        try:
            # One that is not -1: the number of slices may be.
            changed = on_mesh(setup, **sizes, dcn_data=setup.slices)
            peak = plan.make(changed).peak
        except UserError as error:
            refused[_cause(str(error))] += 1
            continue
        if peak <= chip.usable_bytes:
            seconds = collectives.whole_step(changed, chip)
            fitting.append(Candidate(_settings(setup.config.mesh, sizes), peak, seconds))
    best = min(fitting, key=lambda candidate: candidate.seconds, default=None)
    return Choice(best, len(fitting), tried, dict(refused))


def _sizes(devices: int) -> Iterator[dict[str, int]]:
    """All of them, the simpler first."""
    for tensor in _divisors(devices):
        for fsdp in _divisors(devices // tensor):
            yield {"data": devices // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _settings(mesh: config.Mesh, sizes: dict[str, int]) -> dict[str, int]:
    """What leads from `mesh` to these sizes; "data" is what the others leave, where it may be."""
    data = sizes["data"] if mesh.dcn_data == -1 else -1
    return {
        f"mesh.{axis}": size
        for axis, size in (sizes | {"data": data}).items()
        if getattr(mesh, axis) != size
    }


def _cause(error: str) -> str:
    """What is divided: its numbers differ from mesh to mesh."""
    return error.partition(":")[0]
