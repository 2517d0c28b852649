"""The order of rows, padded shapes (few, all of them met in the first epoch), and padding."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdjax.data import batching
from gkdjax.data.batching import BatchShape, RowOrder
from gkdjax.models import padding
from gkdjax.types import View, ViewPair
from gkdjax.utils.errors import UserError

_small = st.integers(1, 9)


def _ungrouped(seed, purpose, step, batch_size, num_rows) -> np.ndarray:
    return RowOrder(seed, purpose, batch_size, np.zeros(num_rows)).rows(step)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch_size=_small,
    groups=st.lists(st.integers(-1, 3), min_size=1, max_size=40)
    | st.integers(1, 9).map(lambda rows: [0] * rows),
    epochs=_small,
)
def test_rows_of_a_group_fill_batches_and_each_comes_once_an_epoch(
    seed, batch_size, groups, epochs
):
    order, groups = RowOrder(seed, "train", batch_size, groups), np.asarray(groups)
    steps = -(-epochs * len(groups) // batch_size)
    batches = [order.rows(step) for step in range(steps)]
    assert all(rows.shape == (batch_size,) for rows in batches)
    epochs_of = np.concatenate(batches)[: epochs * len(groups)].reshape(epochs, len(groups))
    assert (np.sort(epochs_of, axis=1) == np.arange(len(groups))).all()
    # A step needs no step before it: a resumed run reads the rows that the whole run would read.
    again = RowOrder(seed, "train", batch_size, groups)
    for step in reversed(range(steps)):
        assert (again.rows(step) == batches[step]).all()
    if len(groups) % batch_size == 0:  # no batch reaches into another epoch
        whole = sum(count // batch_size for count in np.unique(groups, return_counts=True)[1])
        each_epoch = np.split(np.asarray(batches), epochs)
        mixed = [sum(len(set(groups[rows])) > 1 for rows in epoch) for epoch in each_epoch]
        assert max(mixed) <= len(groups) // batch_size - whole


def test_the_order_depends_on_seed_purpose_and_epoch_and_stays_what_it_is():
    orders = {
        tuple(_ungrouped(seed, purpose, epoch, 50, 50))
        for seed in (0, 1)
        for purpose in ("train", "anchor")
        for epoch in (0, 1)
    }
    assert len(orders) == 8 and tuple(range(50)) not in orders
    # Resuming with a newer version must not change it: NumPy keeps PCG64's streams.
    assert _ungrouped(0, "train", 1, 7, 3).tolist() == [1, 2, 2, 1, 0, 2, 0]
    grouped = RowOrder(0, "train", 4, [0, 1, 2] * 5)
    assert [grouped.rows(s).tolist() for s in (1, 3)] == [[6, 12, 3, 0], [9, 13, 2, 8]]
    _ungrouped(0, "train", 0, 4, 4)[:] = 0  # the caller's own
    assert sorted(_ungrouped(0, "train", 0, 4, 4)) == [0, 1, 2, 3]


def test_batches_of_groups_come_in_no_order_and_the_rest_of_many_groups_stays_together():
    groups = np.repeat([0, 1], 40)
    firsts = [RowOrder(seed, "train", 4, groups).rows(0) for seed in range(20)]
    assert {group for rows in firsts for group in groups[rows]} == {0, 1}
    of_step = [set(groups[RowOrder(0, "train", 4, groups).rows(step)]) for step in range(20)]
    assert all(len(found) == 1 for found in of_step)
    assert of_step[:10] not in ([{0}] * 10, [{1}] * 10)
    groups = np.repeat(np.arange(10), 6)
    order = RowOrder(0, "train", 4, groups)
    kinds = sorted(len(set(groups[order.rows(step)])) for step in range(15))
    assert kinds == [1] * 10 + [2] * 5
    groups = np.repeat([0, 1], 9)  # the second epoch of 18 rows begins within a batch of 4
    order = RowOrder(1, "train", 4, groups)
    pure = [len(set(groups[order.rows(step)])) == 1 for step in range(9)]
    assert sum(pure[:4]) == 4 and sum(pure[5:]) >= 3


def test_groups_of_lengths():
    assert batching.length_groups([5, 7, 3, 8]).tolist() == [0, 0, 0, 0]  # all are padded to 8
    few = [100, 9, 300, 31, 10, 60, 200, 11]
    assert batching.length_groups(few).tolist() == [2, 0, 3, 1, 0, 1, 2, 0]
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(5, 0.6, 1000)).astype(int) + 1
    groups = batching.length_groups(lengths)
    counts = np.bincount(groups)
    assert len(counts) == 4 and counts.min() > 200
    for shorter, longer in itertools.pairwise(range(4)):
        assert lengths[groups == shorter].max() <= lengths[groups == longer].min() + 16


_needs = st.lists(st.tuples(*[st.integers(1, 300)] * 3), min_size=1, max_size=20)


@settings(deadline=None)
@given(needs=_needs, most=st.integers(1, 5), allowed=st.sampled_from([(), (7, 100, 300)]))
def test_every_need_is_held_and_every_shape_is_somebodys_smallest(needs, most, allowed):
    chain = batching.choose_shapes(needs, allowed, most)
    assert 1 <= len(chain) <= most
    taken = [batching.smallest(chain, need) for need in needs]
    assert all((np.asarray(taken) >= needs).all(axis=1))
    assert {*taken} == {*chain}  # nothing is left to be compiled later
    for before, after in itertools.pairwise(chain):
        assert before != after and (np.asarray(before) <= after).all()
    if allowed:
        assert {n for shape in chain for n in shape} <= set(allowed)


def test_shapes_hold_needs_that_were_not_among_theirs():
    chain = batching.choose_shapes([(8, 80), (60, 16)], ())
    assert chain == ((64, 16), (64, 80))
    assert batching.smallest(chain, (60, 80)) == (64, 80)
    with pytest.raises(ValueError, match=r"none of the shapes .* holds \(65, 8\)"):
        batching.smallest(chain, (65, 8))
    with pytest.raises(UserError, match=r"a batch needs 17 tokens.*data.bucket_lengths is 16"):
        batching.choose_shapes([(4, 17)], (16, 8))
    have = ((8, 8), (16, 24))
    assert batching.extend_shapes(have, [(3, 9), (16, 24)], ()) == have
    assert batching.extend_shapes(have, [(3, 9), (17, 2), (9, 30)], ()) == (*have, (24, 32))
    assert batching.extend_shapes(have, [(17, 2)], (8, 16, 24, 64)) == (*have, (24, 24))
    # One long row does not lengthen all batches.
    needs = [(20, 40, 10)] * 30 + [(25, 44, 10)] * 30 + [(900, 950, 500)]
    chain = batching.choose_shapes(needs, ())
    assert (chain[0], chain[-1]) == ((24, 40, 16), (960, 960, 512))
    assert batching.smallest(chain, (25, 44, 10)) == (32, 48, 16)


def test_lengths_are_rounded_up_by_an_eighth_at_most_and_ladders_end_at_the_longest():
    for length, rounded in ((1, 8), (8, 8), (9, 16), (100, 104), (127, 128), (1000, 1024)):
        assert padding.round_up(length, ()) == rounded
    ladder = (16, 32, 48, 64, 96, 128, 192, 256)
    for longest in (10, 16, 17, 64, 100, 256):
        expected = (*(n for n in ladder if n < longest), longest)
        assert padding.ladder(longest, ()) == expected
    assert padding.ladder(100, (9, 3)) == (3, 9)


def test_shares_of_padding():
    batches = [[BatchShape(3, 8, 2), BatchShape(5, 8, 1)], [BatchShape(9, 16, 4)] * 2]
    assert batching.padding_shares(batches, [(6, 8, 2), (12, 16, 4)]) == {
        "student": pytest.approx(1 - (3 + 5 + 18) / (12 + 24)),
        "teacher": 0.0,
        "targets": pytest.approx(1 - (3 + 8) / (4 + 8)),
    }


def _pair(i, student, teacher, targets):
    """Views of these lengths that end with the targets; student and teacher differ in their ids."""
    views = [
        View(
            np.arange(1, length + 1, dtype=np.int32) * factor,
            np.arange(length - targets - 1, length - 1, dtype=np.int32),
        )
        for length, factor in ((student, 1), (teacher, 2))
    ]
    return ViewPair(f"rows:{i}", 10 + i, *views, np.arange(targets, dtype=np.int32) + 50)


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(_small, _small, _small), min_size=1, max_size=4),
    spare=st.tuples(*[st.integers(0, 3)] * 3),
)
def test_padding_keeps_every_row(sizes, spare):
    pairs = [_pair(i, n + s, n + t, n) for i, (s, t, n) in enumerate(sizes)]
    need = batching.longest([batching.shape_of(pair) for pair in pairs])
    S, T, N = shape = BatchShape(*(a + b for a, b in zip(need, spare, strict=True)))
    batch = batching.pad(pairs, shape, pad_id=-7)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))
    assert batch.row_id_B.tolist() == [10 + i for i in range(len(sizes))]
    students, teachers = [p.student for p in pairs], [p.teacher for p in pairs]
    for rows, padded, mask, fill, length in (
        ([v.ids for v in students], batch.student_tokens_BS, batch.student_mask_BS, -7, S),
        ([v.ids for v in teachers], batch.teacher_tokens_BT, batch.teacher_mask_BT, -7, T),
        ([p.target_ids for p in pairs], batch.target_ids_BN, batch.target_mask_BN, 0, N),
        ([v.at for v in students], batch.student_at_BN, batch.target_mask_BN, 0, N),
        ([v.at for v in teachers], batch.teacher_at_BN, batch.target_mask_BN, 0, N),
    ):
        assert padded.shape == mask.shape == (len(rows), length)
        assert padded.dtype == np.int32 and mask.dtype == bool
        for row, out, real in zip(rows, padded, mask, strict=True):
            np.testing.assert_array_equal(out[: len(row)], row)
            assert real[: len(row)].all() and not real[len(row) :].any()
            assert (out[len(row) :] == fill).all()
