"""Prefixes that are read once, against rows that bring theirs along."""

import types

import builders
import jax
import numpy as np
import pytest

from gkdjax.models import prefix_cache, sampler
from gkdjax.models.prefix_cache import PrefixCache, common_beginning
from gkdjax.models.sampler import Keep
from gkdjax.parallel import mesh
from gkdjax.teachers.local import LocalTeacher
from gkdjax.types import SamplingParams

DECODER, PARAMS = builders.small_model(
    layer_types=["sliding_attention", "full_attention"], sliding_window=5
)
RNG = np.random.default_rng(0)
LONG, OTHER, STRANGE = (RNG.integers(3, 32, n).astype(np.int32) for n in (12, 9, 13))
MESH = mesh.make_mesh()
REPLICATED = mesh.replicate(MESH, PARAMS)
NEVER = (-1,)


@pytest.fixture(autouse=True)
def short_prefixes_count(monkeypatch):
    monkeypatch.setattr(prefix_cache, "LEAST_TOKENS", 8)


def row(prefix, *ids) -> np.ndarray:
    return np.concatenate([prefix, np.asarray(ids, np.int32)])


def store(*groups, max_bytes: int = 2**20) -> PrefixCache:
    made = PrefixCache(DECODER, REPLICATED, max_bytes)
    made.register(groups)
    return made


GROUPS = ([row(LONG, 4, 5), row(LONG, 6)], [row(OTHER, 7), row(OTHER, 8, 9)])


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([[1, 2, 3, 4], [1, 2, 9]], [1, 2]),
        ([[1, 2, 3], [1, 2, 3]], [1, 2]),  # a token of each is left
        ([[1, 2, 3], [1, 2]], [1]),
        ([[1, 2], [3, 2]], []),
        ([[1, 2, 3]], [1, 2]),
    ],
)
def test_the_common_beginning(rows, wanted):
    assert common_beginning([np.asarray(r, np.int32) for r in rows]).tolist() == wanted


def test_single_rows_and_short_prefixes_are_let_alone():
    made = store([row(LONG, 4)], [row(OTHER[:7], 4), row(OTHER[:7], 5)])
    assert readings(made, batch_of(LONG)) == [(0, [0, 1, 2, 3])]
    made.predicting_hidden(batch_of(LONG), MESH)
    assert made.num_reads == 0


def batch_of(*prefixes, rows: int = 4):
    """Teacher's views of `prefixes` in turn, a token to read, and three targets."""
    length = max(map(len, prefixes)) + 4
    tokens_BT = np.zeros((rows, length), np.int32)
    at_BN, mask_BT = np.zeros((rows, 3), np.int32), np.zeros((rows, length), bool)
    for i in range(rows):
        prefix = prefixes[i % len(prefixes)]
        P = len(prefix)
        tokens_BT[i, : P + 4] = row(prefix, *range(4 + i, 8 + i))
        mask_BT[i, : P + 4] = True
        at_BN[i] = P + np.arange(3)
    whole = builders.batch((3,) * rows)
    return type(whole)(
        whole.student_tokens_BS,
        whole.student_mask_BS,
        whole.student_at_BN,
        tokens_BT,
        mask_BT,
        at_BN,
        np.take_along_axis(tokens_BT, at_BN + 1, axis=1),
        np.ones((rows, 3), bool),
        whole.row_id_B,
    )


def readings(made: PrefixCache, batch) -> list[tuple[int, list[int]]]:
    """(tokens of the prefix, its rows) of each reading."""
    return [(len(ids), np.flatnonzero(rows).tolist()) for ids, rows in made._readings(batch)]


def test_what_rows_begin_with_is_taken_off():
    made = store(*GROUPS)
    assert readings(made, batch_of(LONG)) == [(12, [0, 1, 2, 3])]
    tokens, mask, at = prefix_cache._without(12, batch_of(LONG))
    assert tokens.shape == mask.shape == (4, 8)  # four, and padding
    assert mask.tolist() == [[True] * 4 + [False] * 4] * 4
    assert at.tolist() == [[0, 1, 2]] * 4


def test_rows_of_several_prefixes_are_read_once_for_each_if_that_is_less():
    made = store(*GROUPS)
    assert readings(made, batch_of(LONG, OTHER)) == [(12, [0, 2]), (9, [1, 3])]
    # 17 tokens of each row are fewer than 5 and 17: a row without a prefix has to be read whole.
    assert readings(made, batch_of(LONG, STRANGE)) == [(0, [0, 1, 2, 3])]


def test_a_position_that_predicts_is_never_taken_off():
    made = store(*GROUPS)
    batch = batch_of(LONG)
    batch.teacher_at_BN[2, 0] = 11  # the prefix's last token predicts a target here
    assert readings(made, batch) == [(0, [0, 1, 2, 3])]
    # Padding among the targets says nothing.
    batch.target_mask_BN[2, 0] = False
    assert readings(made, batch) == [(12, [0, 1, 2, 3])]
    # Nor does a row without any.
    batch.target_mask_BN[2] = False
    assert readings(made, batch) == [(12, [0, 1, 2, 3])]
    assert prefix_cache._without(12, batch)[2].min() == 0


def test_each_prefix_is_read_once_and_the_least_recently_used_makes_room():
    made = store(*GROUPS)
    for _ in range(3):
        read(made, LONG, OTHER)
    assert made.num_reads == 2
    small = store(*GROUPS, max_bytes=prefix_cache._nbytes(made._read(LONG)))
    for prefix in (LONG, LONG, OTHER, OTHER, LONG):
        read(small, prefix)
    assert small.num_reads == 3
    none = store(*GROUPS, max_bytes=0)
    read(none, LONG), read(none, LONG)
    assert none.num_reads == 2  # it works, and keeps nothing


def read(made: PrefixCache, *prefixes):
    return np.asarray(made.predicting_hidden(batch_of(*prefixes), MESH))


@pytest.mark.parametrize(
    ("prefixes", "reads"), [((LONG,), 1), ((LONG, OTHER), 2), ((OTHER, STRANGE), 0)]
)
def test_hidden_states_do_not_depend_on_who_reads_the_prefix(prefixes, reads):
    knows, does_not = store(*GROUPS), store()
    got, wanted = read(knows, *prefixes), read(does_not, *prefixes)
    assert (knows.num_reads, does_not.num_reads) == (reads, 0)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("top_k", [None, 4])
def test_a_teacher_says_the_same_with_and_without(top_k):
    chat = types.SimpleNamespace(stop_ids=NEVER, shared=None)
    how = {"top_k": top_k, "temperature": 1.0, "vocab_size": 32, "lengths": (16,), "batch_size": 4}
    how |= {"chunk_size": 8, "mesh": MESH, "prefix_bytes": 2**20}
    knows, does_not = (
        LocalTeacher(DECODER, REPLICATED, chat, "a teacher", **how) for _ in range(2)
    )
    knows.prefixes.register(GROUPS)
    got, wanted = (teacher.targets(batch_of(LONG)) for teacher in (knows, does_not))
    assert (knows.prefixes.num_reads, does_not.prefixes.num_reads) == (1, 0)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_does_not_depend_on_who_reads_the_prefix(temperature):
    made = store(*GROUPS)
    prompts = [row(OTHER, 4), row(LONG, 5, 6), row(OTHER, 7, 8), row(LONG, 9), row(LONG, 3)]
    how = {"stop_ids": NEVER, "batch_size": 4, "mesh": MESH, "keep": Keep(3, 1.0)}
    sampling = SamplingParams(2, temperature, 0.9)
    wanted = sampler.sample(DECODER, REPLICATED, prompts, range(5), sampling, lengths=(16,), **how)
    got = made.sample(prompts, range(5), sampling, lengths=(3, 16), **how)
    assert made.num_reads == 2
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_allclose(one.kept.topk.logprobs, other.kept.topk.logprobs, atol=1e-4)


def test_prefixes_of_many_lengths_make_few_shapes():
    prefixes = [RNG.integers(3, 32, n).astype(np.int32) for n in (9, 16)]
    made = store(*([row(prefix, 4), row(prefix, 5)] for prefix in prefixes))
    found = [made._read(prefix) for prefix in prefixes]
    assert [int(prefix.length) for prefix in found] == [9, 16]
    views = [prefix_cache._without(len(prefix), batch_of(prefix)) for prefix in prefixes]
    for shapes in (jax.tree.map(np.shape, found), jax.tree.map(np.shape, views)):
        assert shapes[0] == shapes[1]


def test_nothing_is_written_to_no_prompt():
    how = {"stop_ids": NEVER, "batch_size": 4, "lengths": (16,)}
    assert store(*GROUPS).sample([], [], SamplingParams(2, 0.0, 1.0), **how) == []


def test_groups_that_would_cost_more_than_they_save_are_not_made():
    made = store(*GROUPS)
    prompts = [row(OTHER, 4), row(LONG, 5, 6)]
    cheap, dear = (list(made._groups(prompts, num_new)) for num_new in (2, 20))
    assert [(len(prefix), list(rows)) for prefix, rows in cheap] == [(9, [0]), (12, [1])]
    assert [(len(prefix), list(rows)) for prefix, rows in dear] == [(0, [0, 1])]
