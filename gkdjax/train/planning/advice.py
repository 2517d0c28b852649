"""Finds meshes on which a run fits, and changes of a config that does not fit."""

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


class Candidate(NamedTuple):
    """A mesh on which a run fits."""

    settings: dict[str, int]  # what to change in the config, by key
    peak: int  # bytes on one device


class Meshes(NamedTuple):
    """All meshes of some devices."""

    fitting: list[Candidate]  # the best first
    tried: int
    refused: dict[str, int]  # what a mesh does not divide -> how many meshes

    @property
    def best(self) -> Candidate | None:
        return self.fitting[0] if self.fitting else None


def meshes(inputs: PlanInputs, limit: int) -> Meshes:
    """Sorts the meshes that fit: the fewest of "fsdp" and "tensor" in use, then the least bytes.

    Args:
      inputs: with the slices that the config names.
      limit: bytes of one device.
    """
    fitting, tried, refused = [], 0, collections.Counter()
    devices = inputs.mesh.size // inputs.slices
    for tensor in _divisors(devices):
        for fsdp in _divisors(devices // tensor):
            sizes = {"data": devices // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
            tried += 1
            try:
                # One that is not -1: the number of slices may be.
                peak = memory.plan(on_mesh(inputs, **sizes, dcn_data=inputs.slices)).peak
            except UserError as error:
                refused[str(error).partition(":")[0]] += 1  # numbers differ from mesh to mesh
                continue
            if peak <= limit:
                settings = _settings(inputs.config.mesh, sizes)
                fitting.append(((fsdp > 1) + (tensor > 1), peak, settings))
    fitting.sort(key=lambda each: each[:2])
    return Meshes([Candidate(s, peak) for _, peak, s in fitting], tried, dict(refused))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _settings(mesh: config.Mesh, sizes: dict[str, int]) -> dict[str, int]:
    """Leads from `mesh` to these sizes; "data" is what the others leave, where it may be."""
    sizes = sizes | {"data": sizes["data"] if mesh.dcn_data == -1 else -1}
    changed = {axis: size for axis, size in sizes.items() if getattr(mesh, axis) != size}
    return {f"mesh.{axis}": size for axis, size in changed.items()}


class Change(NamedTuple):
    """One change of a config, made alone."""

    settings: dict[str, int | str | bool]  # by key; several only for a mesh
    saves: int  # bytes of the peak on one device


def changes(inputs: PlanInputs, limit: int, best: Candidate | None) -> list[Change]:
    """Proposes at most three, the largest saving first, and only those that save something.

    A number that can be lowered step by step is lowered until the run fits, or to the end. If the
    config leaves the mesh to the defaults, the best mesh comes first.

    Args:
      inputs: that do not fit.
      limit: bytes of one device.
      best: the mesh on which the run fits, or None.
    """
    before, found, first = memory.plan(inputs).peak, [], []
    mesh, default = inputs.config.mesh, config.Mesh()
    if best is not None and all(getattr(mesh, axis) == getattr(default, axis) for axis in AXES):
        first = [Change(best.settings, before - best.peak)]
    for key, values in _candidates(inputs):
        if first and key.startswith("mesh."):
            continue
        last = None
        for value in values:
            try:
                peak = memory.plan(_changed(inputs, key, value)).peak
            except UserError:  # the devices cannot share such rows or weights
                continue
            last = Change({key: value}, before - peak)
            if peak <= limit:
                break
        if last is not None and last.saves > 0:
            found.append(last)
    return [*first, *sorted(found, key=lambda change: -change.saves)][:_MOST]


def _candidates(inputs: PlanInputs) -> Iterator[tuple[str, list]]:
    c, mesh = inputs.config, inputs.mesh
    if not c.train.remat:
        yield "train.remat", [True]
    rows = c.train.batch_size  # the parts must divide them, and an anchor's
    rows = rows if c.anchor.data is None else math.gcd(rows, c.anchor.batch_size)
    yield "train.grad_accum_steps", [n for n in _divisors(rows) if n > c.train.grad_accum_steps]
    if inputs.full:
        yield "student.adapter", ["lora"]
    if c.student.compute_dtype == "float32":
        yield "student.compute_dtype", ["bfloat16"]
    if not inputs.full and inputs.student_dtype == "float32":
        yield "student.dtype", ["bfloat16"]
    if inputs.of_teacher is not None:
        yield "teacher.backend", ["vllm"]
    if inputs.teacher is not None and inputs.teacher.dtype(c.teacher.dtype) == "float32":
        yield "teacher.dtype", ["bfloat16"]
    for key, number, least in (
        ("gkd.chunk_size", c.gkd.chunk_size, 64),
        ("eval.batch_size", c.eval.batch_size, row_shares(mesh)),
    ):
        yield key, [number >> i for i in range(1, number.bit_length()) if number >> i >= least]
    yield "teacher.prefix_bytes", [0] if c.teacher.prefix_bytes else []
    for axis in ("fsdp", "tensor"):
        doubled = (mesh.shape[axis] << i for i in range(1, mesh.size.bit_length()))
        yield f"mesh.{axis}", [size for size in doubled if size <= mesh.size]


def _changed(inputs: PlanInputs, key: str, value) -> PlanInputs:
    section, _, name = key.partition(".")
    if section == "mesh":
        return on_mesh(inputs, **{name: value})
    part = dataclasses.replace(getattr(inputs.config, section), **{name: value})
    if key != "teacher.backend":
        config = dataclasses.replace(inputs.config, **{section: part})
        return dataclasses.replace(inputs, config=config)
    part = dataclasses.replace(part, top_k=part.top_k or 20)
    config = dataclasses.replace(inputs.config, teacher=part)
    return dataclasses.replace(inputs, config=config, teacher=None, toggles=False)
