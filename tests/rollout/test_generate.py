"""Which responses are accepted, and how often the others are written again."""

import types

import numpy as np
import pytest

from gkdjax.data.dataset import RolloutFilter
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.views import RowStatus
from gkdjax.rollout.generate import Generator, write
from gkdjax.types import Completion
from gkdjax.utils import seeds

CALLS = {  # seed at step 7 -> (row, attempt)
    seeds.fold(1, "data.train/teacher", 7, row, attempt): (row, attempt)
    for row in range(3)
    for attempt in range(6)
}
CHAT = types.SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))


@pytest.mark.parametrize(
    ("pattern", "max_retries", "texts", "expected", "calls"),
    [
        # Only what lacks the pattern is written again.
        (
            *("yes$", 5, [["yes"], ["no", "no", "oh yes"], ["no", "yes"]]),
            [("yes", 0, "KEPT"), ("oh yes", 2, "KEPT"), ("yes", 1, "KEPT")],
            [[(0, 0), (1, 0), (2, 0)], [(1, 1), (2, 1)], [(1, 2)]],
        ),
        (
            *("yes", 2, [["no"], ["yes"]], [("no", 3, "UNMATCHED"), ("yes", 0, "KEPT")]),
            [[(0, 0), (1, 0)], [(0, 1)], [(0, 2)]],
        ),
        ("yes", 0, [["no"]], [("no", 1, "UNMATCHED")], [[(0, 0)]]),
        # A response needs a token, whatever the pattern.
        *(
            (pattern, 1, [["", "x"], [""]], [("x", 1, "KEPT"), ("", 2, "EMPTY")], None)
            for pattern in (None, ".*")
        ),
        (None, 2, [], [], []),
    ],
)
def test_what_is_refused_is_written_again_up_to_a_bound(
    pattern, max_retries, texts, expected, calls
):
    made = []

    def answer(prompts, keys):
        """The n-th text of a row at attempt n, or its last."""
        assert prompts == [f"teacher {CALLS[key][0]}" for key in keys]
        made.append([CALLS[key] for key in keys])
        found = [texts[row][min(n, len(texts[row]) - 1)] for row, n in made[-1]]
        return [Completion(np.array([*map(ord, text)], np.int32), True) for text in found]

    rules = RolloutFilter(TargetRules(("assistant",), pattern), max_retries, max_new_tokens=9)
    dataset = types.SimpleNamespace(
        purpose="data.train",
        seed=1,
        responses=rules,
        rules=types.SimpleNamespace(teacher_chat=CHAT),
        prompt=lambda row, who: f"{who} {row}",
    )
    wanted = [(7, row) for row in range(len(texts))]
    found = write(dataset, "teacher", wanted, Generator("a", answer))
    assert {one.author for one in found} <= {"a"} and calls in (None, made)
    assert expected == [
        (CHAT.decode(one.ids), one.refused, rules.status(one, CHAT).name) for one in found
    ]


@pytest.mark.parametrize(("shared", "status"), [(None, "KEPT"), (10, "KEPT"), (9, "EMPTY")])
def test_a_response_with_an_id_that_the_student_lacks_counts_as_one_without_a_token(shared, status):
    rules = RolloutFilter(TargetRules(("assistant",)), 0, 9, shared)
    assert rules.status(Completion(np.array([3, 9], np.int32), True), CHAT) is RowStatus[status]
