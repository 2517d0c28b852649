"""Parts of the tests that are too slow to run every time; pytest.ini says how they are run."""

import collections
import re
from collections.abc import Sequence

import pytest

_KINDS = ("slow", "integration")
_SECONDS = 60.0  # of a file whose marks do not say it


def parse(text: str) -> tuple[int, int]:
    """Reads "2/4", the second of four parts, as (1, 4).

    Raises:
      pytest.UsageError: it is not of that form, or there is no such part.
    """
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not found or int(found[1]) > int(found[2]):
        raise pytest.UsageError(f"--slice={text}: K/N, the K-th of N parts, from 1/N to N/N")
    return int(found[1]) - 1, int(found[2])


def left_out(items: Sequence[pytest.Item], part: int, parts: int) -> set[pytest.Item]:
    """Finds the slow tests that are in other parts.

    The tests of a file share what they wait for, so they stay together; parametrised ones whose
    mark says `apart=True` do not. The longest goes first, to the part that has least to do.
    """
    units, seconds = collections.defaultdict(list), collections.Counter()
    for item in items:
        marks = [mark for mark in item.iter_markers() if mark.name in _KINDS]
        if not marks:
            continue
        apart = any("apart" in mark.kwargs for mark in marks)
        unit = item.nodeid if apart else str(item.path)
        units[unit].append(item)
        told = max((mark.args[0] for mark in marks if mark.args), default=_SECONDS)
        seconds[unit] = max(seconds[unit], told)
    load, others = [0.0] * parts, set()
    for unit in sorted(units, key=lambda unit: (-seconds[unit], unit)):
        place = load.index(min(load))
        load[place] += seconds[unit]
        if place != part:
            others.update(units[unit])
    return others
