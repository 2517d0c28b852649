"""Meshes on which a run fits, and changes of a config that does not, with what each saves."""

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from gkdjax import config
from gkdjax.parallel.mesh import AXES, row_shares
from gkdjax.train.planning import memory
from gkdjax.train.planning.setup import PlanInputs, on_mesh
from gkdjax.utils.errors import UserError

_MOST = 3
_MESH = {f"mesh.{axis}" for axis in AXES}


class Candidate(NamedTuple):
    """A mesh on which a run fits."""

    settings: dict[str, int]  # what to change in the config, by key
    peak: int  # bytes on one device


@dataclasses.dataclass(frozen=True)
class Meshes:
    """All meshes of some devices."""

    fitting: list[Candidate]  # the best first
    tried: int
    refused: dict[str, int]  # what a mesh does not divide -> how many meshes

    @property
    def best(self) -> Candidate | None:
        return self.fitting[0] if self.fitting else None


def meshes(setup: PlanInputs, limit: int) -> Meshes:
    """Sorts the meshes that fit: the fewest of "fsdp" and "tensor" in use, then the least bytes.

    Args:
      setup: with the slices that the config names.
      limit: bytes of one device.
    """
    fitting, tried, refused = [], 0, collections.Counter()
    for sizes in _sizes(setup.mesh.size // setup.slices):
        tried += 1
        try:
            # One that is not -1: the number of slices may be.
            peak = memory.plan(on_mesh(setup, **sizes, dcn_data=setup.slices)).peak
        except UserError as error:
            refused[str(error).partition(":")[0]] += 1  # numbers differ from mesh to mesh
            continue
        if peak <= limit:
            axes = (sizes["fsdp"] > 1) + (sizes["tensor"] > 1)
            fitting.append((axes, Candidate(_settings(setup.config.mesh, sizes), peak)))
    fitting.sort(key=lambda each: (each[0], each[1].peak))
    return Meshes([candidate for _, candidate in fitting], tried, dict(refused))


def _sizes(devices: int) -> Iterator[dict[str, int]]:
    for tensor in _divisors(devices):
        for fsdp in _divisors(devices // tensor):
            yield {"data": devices // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _settings(mesh: config.Mesh, sizes: dict[str, int]) -> dict[str, int]:
    """Leads from `mesh` to these sizes; "data" is what the others leave, where it may be."""
    data = sizes["data"] if mesh.dcn_data == -1 else -1
    return {
        f"mesh.{axis}": size
        for axis, size in (sizes | {"data": data}).items()
        if getattr(mesh, axis) != size
    }


class Change(NamedTuple):
    """One change of a config, made alone."""

    settings: dict[str, int | str | bool]  # by key; several of a mesh alone
    saves: int  # bytes of the peak on one device


def changes(setup: PlanInputs, limit: int, best: Candidate | None) -> list[Change]:
    """Proposes at most three, the largest saving first, and only those that save something.

    A number that can be lowered step by step is lowered until the run fits, or to the end. If the
    config leaves the mesh to the defaults, the best one comes first.

    Args:
      setup: that does not fit.
      limit: bytes of one device.
      best: the mesh on which it fits, or None.
    """
    before, found, first = memory.plan(setup).peak, [], []
    mesh, default = setup.config.mesh, config.Mesh()
    unset = all(getattr(mesh, axis) == getattr(default, axis) for axis in AXES)
    if best is not None and unset:
        first = [Change(best.settings, before - best.peak)]
    for key, values in _candidates(setup):
        last = None
        for value in values:
            try:
                peak = memory.plan(_changed(setup, key, value)).peak
            except UserError:  # the devices cannot share such rows or weights
                continue
            last = Change({key: value}, before - peak)
            if peak <= limit:
                break
        if last is not None and last.saves > 0:
            found.append(last)
    if first:  # or the same would be said twice
        found = [each for each in found if not each.settings.keys() & _MESH]
    return [*first, *sorted(found, key=lambda change: -change.saves)][:_MOST]


def _candidates(setup: PlanInputs) -> Iterator[tuple[str, list]]:
    c = setup.config
    if not c.train.remat:
        yield "train.remat", [True]
    yield "train.grad_accum_steps", _more_parts(setup)
    if setup.full:
        yield "student.adapter", ["lora"]
    if c.student.compute_dtype == "float32":
        yield "student.compute_dtype", ["bfloat16"]
    if not setup.full and setup.student.dtype(c.student.dtype) == "float32":
        yield "student.dtype", ["bfloat16"]
    if setup.of_teacher is not None:
        yield "teacher.backend", ["vllm"]
    if setup.teacher is not None and setup.teacher.dtype(c.teacher.dtype) == "float32":
        yield "teacher.dtype", ["bfloat16"]
    yield "gkd.chunk_size", _halvings(c.gkd.chunk_size, 64)
    yield "eval.batch_size", _halvings(c.eval.batch_size, row_shares(setup.mesh))
    yield "teacher.prefix_bytes", [0] if c.teacher.prefix_bytes else []
    for axis in ("fsdp", "tensor"):
        yield f"mesh.{axis}", _doublings(setup.mesh.shape[axis], setup.mesh.size)


def _more_parts(setup: PlanInputs) -> list[int]:
    """Numbers of parts that divide the batch, and an anchor's, as the config has to."""
    c = setup.config
    rows = c.train.batch_size
    if c.anchor.data is not None:
        rows = math.gcd(rows, c.anchor.batch_size)
    return [n for n in range(c.train.grad_accum_steps + 1, rows + 1) if rows % n == 0]


def _halvings(number: int, least: int) -> list[int]:
    found = []
    while number // 2 >= least:
        number //= 2
        found.append(number)
    return found


def _doublings(number: int, most: int) -> list[int]:
    found = []
    while (number := 2 * number) <= most:
        found.append(number)
    return found


def _changed(setup: PlanInputs, key: str, value) -> PlanInputs:
    section, _, name = key.partition(".")
    if section == "mesh":
        return on_mesh(setup, **{name: value})
    part = dataclasses.replace(getattr(setup.config, section), **{name: value})
    config = dataclasses.replace(setup.config, **{section: part})
    if key != "teacher.backend":
        return dataclasses.replace(setup, config=config)
    at_server = dataclasses.replace(config.teacher, top_k=config.teacher.top_k or 20)
    config = dataclasses.replace(config, teacher=at_server)
    return dataclasses.replace(setup, config=config, teacher=None, toggles=False)
