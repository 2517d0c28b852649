"""What to change in a config that does not fit, with the bytes that each change saves."""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from gkdjax.errors import UserError
from gkdjax.planning import plan
from gkdjax.planning.models import Setup

_MOST = 3


class Change(NamedTuple):
    """One change of a config, made alone."""

    key: str
    value: int | str | bool
    saves: int  # bytes of the peak on one device


def changes(setup: Setup, limit: int) -> list[Change]:
    """At most three, the largest saving first, and only those that save something.

    Of a number that can be lowered step by step, the first step with which the run fits, or the
    last one.

    Args:
      setup: that does not fit.
      limit: bytes of one device.
    """
    before, found = plan.make(setup).peak, []
    for key, values in _candidates(setup):
        best = None
        for value in values:
            try:
                peak = plan.make(_changed(setup, key, value)).peak
            except UserError:  # the devices cannot share such rows
                continue
            best = Change(key, value, before - peak)
            if peak <= limit:
                break
        if best is not None and best.saves > 0:
            found.append(best)
    return sorted(found, key=lambda change: -change.saves)[:_MOST]


def _candidates(setup: Setup) -> Iterator[tuple[str, list]]:
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
    if setup.in_process is not None:
        yield "teacher.backend", ["vllm"]
    if setup.teacher is not None and setup.teacher.dtype(c.teacher.dtype) == "float32":
        yield "teacher.dtype", ["bfloat16"]
    yield "gkd.chunk_size", _halvings(c.gkd.chunk_size, 64)
    yield "eval.batch_size", _halvings(c.eval.batch_size, setup.devices)
    yield "teacher.prefix_bytes", [0] if c.teacher.prefix_bytes else []


def _more_parts(setup: Setup) -> list[int]:
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


def _changed(setup: Setup, key: str, value) -> Setup:
    section, _, name = key.partition(".")
    part = dataclasses.replace(getattr(setup.config, section), **{name: value})
    config = dataclasses.replace(setup.config, **{section: part})
    if key != "teacher.backend":
        return dataclasses.replace(setup, config=config)
    at_server = dataclasses.replace(config.teacher, top_k=config.teacher.top_k or 20)
    config = dataclasses.replace(config, teacher=at_server)
    return dataclasses.replace(setup, config=config, teacher=None, toggles=False)
