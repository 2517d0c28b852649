"""Draws are functions of (seed, purpose, numbers)."""

from gkdjax.utils import seeds


def test_each_part_matters_and_nothing_else_does():
    calls = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 2), (0, "a", 1, 2), (0, "a", 2, 1)]
    folded = [seeds.fold(*call) for call in calls]
    assert len(set(folded)) == len(calls)
    assert folded == [seeds.fold(*call) for call in calls]
    assert all(0 <= number < 2**32 for number in folded)
    drawn = [seeds.generator(*call).random() for call in calls]
    assert len(set(drawn)) == len(calls)
    assert drawn == [seeds.generator(*call).random() for call in calls]


def test_a_known_value_so_that_old_runs_resume():
    assert seeds.fold(0, "lora") == 1318398691
