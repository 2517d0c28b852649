"""The planner beside what XLA compiles, by the command that the README names."""

import pytest
from readme_commands import README

from gkdjax.benchmarks import planned_memory
from gkdjax.benchmarks.planned_memory import CASES, READINGS


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_training_step_takes_what_was_planned(case):
    planned, measured = planned_memory.compare(case)
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("rows", "length"), READINGS[1:])
def test_a_forward_pass_takes_what_was_planned(rows, length):
    planned, measured = planned_memory.compare_reading(rows, length)
    assert planned == pytest.approx(measured, rel=0.15)


def test_the_readme_names_it():
    assert "python -m gkdjax.benchmarks.planned_memory" in README.read_text()
