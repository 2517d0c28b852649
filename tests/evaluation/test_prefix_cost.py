"""What is timed, in which order, and what is left out; not how long it takes."""

import time

import builders
import numpy as np
import pytest

from gkdjax.evaluation import prefix_cost
from gkdjax.evaluation.scoring import EvalModel
from gkdjax.parallel import mesh

PREFIX = np.arange(3, 27, dtype=np.int32)
PROMPTS = [np.asarray([5, 6 + i], np.int32) for i in range(3)]


class _Chat:
    stop_ids = (1, 2)


@pytest.fixture(scope="module")
def reader() -> EvalModel:
    decoder, params = builders.small_model()
    return EvalModel.of(decoder, params, _Chat(), prefix_bytes=0)


def measure(reader, **changes):
    prompts = PROMPTS, [np.concatenate([PREFIX, p]) for p in PROMPTS]
    how = {"new_tokens": 3, "batch_size": 4, "lengths": (8, 32), "vocab_size": 32}
    how |= {"mesh": mesh.make_mesh(), "prefix_bytes": 2**20}
    return prefix_cost.measure(reader, *prompts, **how | changes)


@pytest.fixture
def short_prefixes_count(monkeypatch):
    monkeypatch.setattr("gkdjax.models.prefix_cache.LEAST_TOKENS", 16)


def test_three_ways_are_timed_where_the_prefix_is_worth_keeping(reader, short_prefixes_count):
    found = measure(reader)
    assert (found["rows"], found["new_tokens"]) == (4, 3)
    assert list(found["seconds"]) == ["without", "with", "with_kept"]
    assert all(0 < seconds < 60 for seconds in found["seconds"].values())


def test_a_short_prefix_is_read_each_time(reader):
    assert list(measure(reader)["seconds"]) == ["without", "with"]


def test_a_prefix_that_finds_no_room_is_not_called_kept(reader, short_prefixes_count):
    assert list(measure(reader, prefix_bytes=0)["seconds"]) == ["without", "with"]


def test_every_row_writes_all_of_its_tokens(reader, monkeypatch):
    written, sample = [], prefix_cost.sample
    monkeypatch.setattr(
        prefix_cost, "sample", lambda *a, **k: written.append(sample(*a, **k)) or written[-1]
    )
    measure(reader)
    lengths = {len(completion.ids) for batch in written for completion in batch}
    assert lengths == {3} and not any(t.finished for batch in written for t in batch)


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
