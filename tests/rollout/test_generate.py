"""Which responses are accepted, and how often the others are written again."""

import types

import numpy as np

from gkdjax.data.dataset import RolloutFilter
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.views import RowStatus
from gkdjax.rollout.generate import Generator, write
from gkdjax.types import Completion
from gkdjax.utils import seeds

SEEDS = {  # of (row, attempt) at step 7
    seeds.fold(1, "data.train/teacher", 7, row, attempt): 100 * row + attempt
    for row in range(3)
    for attempt in range(6)
}
TEXT = types.SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))


class Attempts:
    """Answers prompt i, at attempt n, with the n-th text of the i-th list, or its last."""

    def __init__(self, *texts):
        self.texts, self.calls = texts, []

    def __call__(self, prompts, keys):
        assert prompts == [f"teacher {SEEDS[key] // 100}" for key in keys]
        self.calls.append([SEEDS[key] for key in keys])
        return [
            Completion(np.array([*map(ord, self._text(*divmod(call, 100)))], np.int32), True)
            for call in self.calls[-1]
        ]

    def _text(self, place, attempt):
        return self.texts[place][min(attempt, len(self.texts[place]) - 1)]


def accepted(writer, pattern, max_retries):
    rules = RolloutFilter(TargetRules(("assistant",), pattern), max_retries, max_new_tokens=9)
    dataset = types.SimpleNamespace(purpose="data.train", seed=1, responses=rules)
    dataset.rules = types.SimpleNamespace(teacher_chat=TEXT)
    dataset.prompt = lambda row, who: f"{who} {row}"
    wanted = [(7, row) for row in range(len(writer.texts))]
    found = write(dataset, "teacher", wanted, Generator("a", writer))
    assert all(w.author == "a" for w in found)
    return [(TEXT.decode(t.ids), t.refused, rules.fate(t, TEXT)) for t in found]


def test_a_response_without_the_pattern_is_written_again_and_no_other_one_is():
    writer = Attempts(["yes"], ["no", "no", "oh yes"], ["no", "yes"])
    found = accepted(writer, "yes$", 5)
    assert found == [
        ("yes", 0, RowStatus.KEPT),
        ("oh yes", 2, RowStatus.KEPT),
        ("yes", 1, RowStatus.KEPT),
    ]
    assert writer.calls == [[0, 100, 200], [101, 201], [102]]


def test_refilling_ends_at_its_bound():
    writer = Attempts(["no"], ["yes"])
    assert accepted(writer, "yes", 2) == [
        ("no", 3, RowStatus.UNMATCHED),
        ("yes", 0, RowStatus.KEPT),
    ]
    assert writer.calls == [[0, 100], [1], [2]]
    assert accepted(Attempts(["no"]), "yes", 0) == [("no", 1, RowStatus.UNMATCHED)]


def test_a_response_without_a_token_is_refused_with_and_without_a_pattern():
    for pattern in (None, ".*"):
        found = accepted(Attempts(["", "", "x"], [""]), pattern, 2)
        assert found == [("x", 2, RowStatus.KEPT), ("", 3, RowStatus.EMPTY)]


def test_a_response_with_an_id_that_the_student_lacks_counts_as_one_without_a_token():
    text = Completion(np.array([3, 9], np.int32), True)
    fates = [
        RolloutFilter(TargetRules(("assistant",)), 0, 9, shared).fate(text, TEXT)
        for shared in (None, 10, 9)
    ]
    assert fates == [RowStatus.KEPT, RowStatus.KEPT, RowStatus.EMPTY]


def test_nobody_is_asked_for_nothing():
    assert accepted(Attempts(), None, 2) == []
