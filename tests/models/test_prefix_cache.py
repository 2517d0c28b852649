"""Prefixes that are read once, against rows that bring theirs along."""

import dataclasses

import builders
import jax
import numpy as np
import pytest

from gkdjax.models import prefix_cache, sampler
from gkdjax.models.prefix_cache import PrefixCache, common_beginning
from gkdjax.models.sampler import Keep
from gkdjax.parallel import mesh
from gkdjax.types import SamplingParams

DECODER, PARAMS = builders.small_model(
    layer_types=["sliding_attention", "full_attention"], sliding_window=5
)
RNG = np.random.default_rng(0)
LONG, OTHER, UNKNOWN = (RNG.integers(3, 32, n).astype(np.int32) for n in (12, 9, 13))
MESH = mesh.make_mesh()
REPLICATED = mesh.replicate(MESH, PARAMS)
NEVER = (-1,)


@pytest.fixture(autouse=True)
def short_prefixes_count(monkeypatch):
    monkeypatch.setattr(prefix_cache, "LEAST_TOKENS", 8)


def row(prefix, *ids) -> np.ndarray:
    return np.concatenate([prefix, np.asarray(ids, np.int32)])


GROUPS = ([row(LONG, 4, 5), row(LONG, 6)], [row(OTHER, 7), row(OTHER, 8, 9)])


def cache_of(*groups, max_bytes: int = 2**20) -> PrefixCache:
    made = PrefixCache(DECODER, REPLICATED, max_bytes)
    made.register(groups)
    return made


def batch_of(*prefixes):
    """Four teacher's views of `prefixes` in turn, a token to read, and three targets."""
    lengths = [len(prefixes[i % len(prefixes)]) for i in range(4)]
    tokens_BT = np.zeros((4, max(lengths) + 4), np.int32)
    for i, P in enumerate(lengths):
        tokens_BT[i, : P + 4] = row(prefixes[i % len(prefixes)], *range(4 + i, 8 + i))
    at_BN = np.array(lengths)[:, None] + np.arange(3, dtype=np.int32)
    return dataclasses.replace(
        builders.batch((3,) * 4),
        teacher_tokens_BT=tokens_BT,
        teacher_mask_BT=tokens_BT > 0,
        teacher_at_BN=at_BN,
        target_ids_BN=np.take_along_axis(tokens_BT, at_BN + 1, axis=1),
        target_mask_BN=np.ones((4, 3), bool),
    )


def readings(made: PrefixCache, batch) -> list[tuple[int, list[int]]]:
    """(tokens of the prefix, its rows) of each reading."""
    return [(len(ids), list(rows)) for ids, rows in made._readings(batch)]


def hidden(made: PrefixCache, *prefixes):
    return np.asarray(made.predicting_hidden(batch_of(*prefixes), MESH))


def test_the_common_beginning_leaves_a_token_of_each():
    for rows, wanted in (
        *(([[1, 2, 3, 4], [1, 2, 9]], [1, 2]), ([[1, 2, 3], [1, 2, 3]], [1, 2])),
        *(([[1, 2, 3], [1, 2]], [1]), ([[1, 2], [3, 2]], []), ([[1, 2, 3]], [1, 2])),
    ):
        assert common_beginning([np.asarray(r, np.int32) for r in rows]).tolist() == wanted


# Several prefixes are read once each if that is less: 17 tokens of each row are fewer than 5 and
# 17, as a row without a prefix has to be read whole.
@pytest.mark.parametrize(
    ("prefixes", "wanted"),
    [
        ((LONG,), [(12, [0, 1, 2, 3])]),
        ((LONG, OTHER), [(12, [0, 2]), (9, [1, 3])]),
        ((LONG, UNKNOWN), [(0, [0, 1, 2, 3])]),
    ],
)
def test_prefixes_are_left_out_and_the_hidden_states_stay_the_same(prefixes, wanted):
    knows, does_not = cache_of(*GROUPS), cache_of()
    assert readings(knows, batch_of(*prefixes)) == wanted
    got = hidden(knows, *prefixes)
    np.testing.assert_allclose(got, hidden(does_not, *prefixes), atol=1e-4)
    reads = sum(length > 0 for length, _ in wanted)
    assert (knows.num_reads, does_not.num_reads) == (reads, 0)


def test_the_longest_prefix_that_fits_is_taken():
    nested = cache_of([row(LONG[:8], 30), row(LONG[:8], 31)], *GROUPS)
    assert readings(nested, batch_of(LONG)) == [(12, [0, 1, 2, 3])]
    assert readings(nested, batch_of(LONG[:8])) == [(8, [0, 1, 2, 3])]


def test_single_rows_and_short_prefixes_are_let_alone():
    made = cache_of([row(LONG, 4)], [row(OTHER[:7], 4), row(OTHER[:7], 5)])
    assert readings(made, batch_of(LONG)) == [(0, [0, 1, 2, 3])]


def test_a_position_that_predicts_is_never_left_out():
    made, batch = cache_of(*GROUPS), batch_of(LONG)
    batch.teacher_at_BN[2, 0] = 11  # the prefix's last token predicts a target here
    assert readings(made, batch) == [(0, [0, 1, 2, 3])]
    # Padding among the targets does not count, nor does a row without any.
    for padding in (np.s_[2, 0], np.s_[2]):
        batch.target_mask_BN[padding] = False
        assert readings(made, batch) == [(12, [0, 1, 2, 3])]
    assert prefix_cache._without(12, batch)[2].min() == 0


def test_each_prefix_is_read_once_and_the_least_recently_used_makes_room():
    made = cache_of(*GROUPS)
    for _ in range(3):
        hidden(made, LONG, OTHER)
    assert made.num_reads == 2
    one = sum(x.nbytes for x in jax.tree.leaves(made._keys(LONG)))
    two = cache_of(*GROUPS, [row(UNKNOWN, 4), row(UNKNOWN, 5)], max_bytes=2 * one)
    for prefix in (LONG, OTHER, LONG, UNKNOWN, LONG):
        hidden(two, prefix)
    assert two.num_reads == 3
    hidden(two, OTHER)
    assert two.num_reads == 4
    none = cache_of(*GROUPS, max_bytes=0)
    hidden(none, LONG), hidden(none, LONG)
    assert none.num_reads == 2  # it works, and keeps nothing


# 11 new tokens of two groups cost more than is saved: then no prefix is read.
@pytest.mark.parametrize(
    ("temperature", "num_new", "reads"), [(0.0, 2, 2), (1.0, 2, 2), (1, 11, 0)]
)
def test_text_does_not_depend_on_who_reads_the_prefix(temperature, num_new, reads):
    made = cache_of(*GROUPS)
    prompts = [row(OTHER, 4), row(LONG, 5, 6), row(OTHER, 7, 8), row(LONG, 9), row(LONG, 3)]
    how = {"stop_ids": NEVER, "batch_size": 4, "mesh": MESH, "keep": Keep(3, 1.0)}
    sampling = SamplingParams(num_new, temperature, 0.9)
    wanted = sampler.sample(DECODER, REPLICATED, prompts, range(5), sampling, lengths=(16,), **how)
    got = made.sample(prompts, range(5), sampling, lengths=(3, 16), **how)
    assert made.num_reads == reads
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_allclose(one.cached.topk.logprobs, other.cached.topk.logprobs, atol=1e-4)
    assert made.sample([], [], sampling, lengths=(16,), **how) == []


def test_prefixes_of_many_lengths_make_few_shapes():
    prefixes = [RNG.integers(3, 32, n).astype(np.int32) for n in (9, 16)]
    made = cache_of(*([row(prefix, 4), row(prefix, 5)] for prefix in prefixes))
    found = [made._keys(prefix) for prefix in prefixes]
    assert [int(prefix.real_B[0]) for prefix in found] == [9, 16]
    views = [prefix_cache._without(len(prefix), batch_of(prefix)) for prefix in prefixes]
    for shapes in (jax.tree.map(np.shape, found), jax.tree.map(np.shape, views)):
        assert shapes[0] == shapes[1]
    tokens, mask, at = views[0]
    assert tokens.shape == mask.shape == (4, 8)  # four, and padding
    assert mask.tolist() == [[True] * 4 + [False] * 4] * 4
    assert at.tolist() == [[0, 1, 2]] * 4
