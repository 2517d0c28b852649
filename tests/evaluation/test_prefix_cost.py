"""Which ways are timed, in which order, and which are left out; not how long they take."""

import time
import types

import builders
import numpy as np
import pytest

from gkdjax.evaluation import prefix_cost
from gkdjax.evaluation.scoring import EvalModel
from gkdjax.parallel import mesh

PREFIX = np.arange(3, 27, dtype=np.int32)
PROMPTS = [np.asarray([5, 6 + i], np.int32) for i in range(3)]


@pytest.fixture(scope="module")
def model() -> EvalModel:
    decoder, params = builders.small_model()
    return EvalModel.of(decoder, params, types.SimpleNamespace(stop_ids=(1, 2)), prefix_bytes=0)


@pytest.mark.parametrize(
    ("least", "prefix_bytes", "ways"),
    [
        (16, 2**20, ["without", "with", "with_kept"]),
        (None, 2**20, ["without", "with"]),  # a short prefix is read each time
        (16, 0, ["without", "with"]),  # one that finds no room is not called kept
    ],
)
def test_the_ways_that_are_timed_and_every_row_writes_all_of_its_tokens(
    model, monkeypatch, least, prefix_bytes, ways
):
    if least is not None:
        monkeypatch.setattr("gkdjax.models.prefix_cache.LEAST_TOKENS", least)
    written, sample = [], prefix_cost.sample
    monkeypatch.setattr(
        prefix_cost, "sample", lambda *a, **k: written.append(sample(*a, **k)) or written[-1]
    )
    how = {"new_tokens": 3, "batch_size": 4, "lengths": (8, 32), "vocab_size": 32}
    how |= {"mesh": mesh.make_mesh(), "prefix_bytes": prefix_bytes}
    whole = [np.concatenate([PREFIX, prompt]) for prompt in PROMPTS]
    found = prefix_cost.measure(model, PROMPTS, whole, **how)
    assert (found["rows"], found["new_tokens"], list(found["seconds"])) == (4, 3, ways)
    assert all(0 < seconds < 60 for seconds in found["seconds"].values())
    completions = [completion for batch in written for completion in batch]
    assert all(len(one.ids) == 3 and not one.finished for one in completions)


def test_rounds_are_interleaved_and_the_first_of_each_is_not_counted(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def way(name, first, later):
        def write():
            clock[0] += later if name in calls else first
            calls.append(name)

        return write

    found = prefix_cost._rounds({"a": way("a", 100.0, 1.0), "b": way("b", 50.0, 2.0)})
    assert found == {"a": [1.0] * 5, "b": [2.0] * 5}
    assert calls == ["a", "b"] * 6
