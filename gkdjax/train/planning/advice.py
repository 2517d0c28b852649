"""What to change in a config that does not fit, with the bytes that each change saves."""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from gkdjax.parallel.mesh import row_shares
from gkdjax.train.planning import plan
from gkdjax.train.planning.meshes import Candidate, says_nothing
from gkdjax.train.planning.setup import PlanInputs, on_mesh
from gkdjax.utils.errors import UserError

_MOST = 3
_MESH = {"mesh.data", "mesh.fsdp", "mesh.tensor"}


class Change(NamedTuple):
    """One change of a config, made alone."""

    settings: dict[str, int | str | bool]  # by key; several of a mesh alone
    saves: int  # bytes of the peak on one device


def changes(setup: PlanInputs, limit: int, best: Candidate | None) -> list[Change]:
    """At most three, the largest saving first, and only those that save something.

    Of a number that can be lowered step by step, the first step with which the run fits, or the
    last one. A config that says nothing of a mesh is told the best one first.

    Args:
      setup: that does not fit.
      limit: bytes of one device.
      best: the mesh on which it fits, or None.
    """
    before, found, first = plan.make(setup).peak, [], []
    if best is not None and says_nothing(setup.config.mesh):
        first = [Change(best.settings, before - best.peak)]
    for key, values in _candidates(setup):
        last = None
        for value in values:
            try:
                peak = plan.make(_changed(setup, key, value)).peak
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
    yield "train.accumulation", _more_parts(setup)
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
    return [n for n in range(c.train.accumulation + 1, rows + 1) if rows % n == 0]


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
