"""The planner beside what XLA compiles."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from readme_commands import README

from gkdjax.benchmarks import planned_memory
from gkdjax.benchmarks.planned_memory import CASES, READINGS

pytestmark = pytest.mark.slow(120)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_training_step_takes_what_was_planned(case):
    planned, measured = planned_memory.compare(case)
    assert planned == pytest.approx(measured, rel=0.15)


def test_a_step_on_a_mesh_takes_what_was_planned():
    """A process of its own, as it needs eight devices, and these tests have four."""
    script = pathlib.Path(__file__).parents[1] / "sharded_memory.py"
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(README.parent)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [mesh for mesh, _, _ in found] == [[1, 8, 1], [2, 2, 2], [1, 1, 8]]
    for _, planned, measured in found:
        assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("rows", "length"), READINGS[1:])
def test_a_forward_pass_takes_what_was_planned(rows, length):
    planned, measured = planned_memory.compare_reading(rows, length)
    assert planned == pytest.approx(measured, rel=0.15)
