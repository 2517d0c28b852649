"""Who writes the text of a step: draws of each step's own, in the schedule's measure."""

import dataclasses

import numpy as np
import pytest

from gkdjax.config import Gkd
from gkdjax.rollout.schedule import OnPolicySchedule, needs_teacher_text
from gkdjax.utils import seeds

STEPS = 4000


def made(steps: int = STEPS, **changes) -> OnPolicySchedule:
    return OnPolicySchedule(dataclasses.replace(Gkd(), **changes), 3, steps)


@pytest.mark.parametrize("warmup", [0, 5])
def test_a_constant_schedule_compares_each_steps_own_draw_with_the_fraction(warmup):
    plan = made(on_policy_fraction=0.4, on_policy_warmup_steps=warmup)
    for step in range(50):
        drawn = seeds.generator(3, "on_policy", step).random() < 0.4
        assert plan.student_writes(step) == (step >= warmup and drawn)


def test_a_linear_schedule_grows_from_nothing_after_the_warm_up_to_the_fraction():
    linear = {"on_policy_schedule": "linear"}
    plan = made(on_policy_fraction=0.8, on_policy_warmup_steps=1000, **linear)
    found = [plan.probability(step) for step in (0, 999, 1000, 2499, 2500, STEPS - 1)]
    np.testing.assert_allclose(found, [0, 0, 0, 0.8 * 1499 / 2999, 0.8 * 1500 / 2999, 0.8])
    writes = np.array([plan.student_writes(step) for step in range(STEPS)])
    shares = writes.reshape(8, -1).mean(axis=1)
    assert not writes[:1001].any()
    np.testing.assert_allclose(shares[2:], 0.8 * (np.arange(6) + 0.5) / 6, atol=0.06)
    # The last step may be the first after the warm-up.
    plan = made(4, on_policy_fraction=1.0, on_policy_warmup_steps=3, **linear)
    assert [plan.student_writes(step) for step in range(4)] == [False] * 3 + [True]


def test_the_divergence_changes_after_the_warm_up():
    plan = made(divergence="reverse_kl", warmup_divergence="mixed", on_policy_warmup_steps=2)
    assert [plan.divergence(s) for s in range(4)] == ["mixed"] * 2 + ["reverse_kl"] * 2


def test_blocks_begin_at_multiples_and_end_with_the_run():
    plan = made(11, on_policy_fraction=0.5)
    for step in range(11):
        on, off = (plan.steps_of_block(step, 4, on_policy=on) for on in (True, False))
        first = step // 4 * 4
        assert sorted(on + off) == list(range(first, min(first + 4, 11)))
        assert all(plan.student_writes(s) for s in on) and not any(map(plan.student_writes, off))
        assert step >= 8 or (on and off)


def test_only_a_run_that_is_on_policy_throughout_needs_no_teachers_text():
    for changes, needed in (
        ({}, True),
        ({"on_policy_fraction": 0.99}, True),
        ({"on_policy_fraction": 1.0}, False),
        ({"on_policy_fraction": 1.0, "on_policy_warmup_steps": 1}, True),
        ({"on_policy_fraction": 1.0, "on_policy_schedule": "linear"}, True),
    ):
        assert needs_teacher_text(made(**changes).gkd) is needed, changes
