"""The order of rows and the padding."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdjax.data.batching import BatchShape, RowOrder, length_buckets, pad, padding_shares, shape_of
from gkdjax.data.buckets import longest
from gkdjax.types import View, ViewPair

_small = st.integers(1, 9)


def batch_rows(seed, purpose, step, batch_size, num_rows) -> np.ndarray:
    """Of rows without groups."""
    return RowOrder(seed, purpose, batch_size, np.zeros(num_rows)).rows(step)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), batch_size=_small, num_rows=_small, epochs=_small)
def test_each_row_comes_once_an_epoch_whatever_the_batch_size(seed, batch_size, num_rows, epochs):
    steps = -(-epochs * num_rows // batch_size)
    rows = [batch_rows(seed, "train", step, batch_size, num_rows) for step in range(steps)]
    assert all(r.shape == (batch_size,) for r in rows)
    order = np.concatenate(rows)[: epochs * num_rows].reshape(epochs, num_rows)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(num_rows), (epochs, 1)))


def test_a_step_needs_no_step_before_it():
    """What a resumed run reads is what the whole run would have read, in any order of asking."""
    forward = [batch_rows(3, "train", step, 7, 10).tolist() for step in range(20)]
    backward = [batch_rows(3, "train", step, 7, 10).tolist() for step in reversed(range(20))]
    assert forward == backward[::-1]


def test_order_depends_on_seed_purpose_and_epoch():
    orders = {
        tuple(batch_rows(seed, purpose, epoch, 50, 50))
        for seed in (0, 1)
        for purpose in ("train", "anchor")
        for epoch in (0, 1)
    }
    assert len(orders) == 8
    assert tuple(range(50)) not in orders


def test_order_is_this_one():
    """Resuming with a newer version must not change it: NumPy keeps PCG64's streams."""
    assert batch_rows(0, "train", 1, 7, 3).tolist() == [1, 2, 2, 1, 0, 2, 0]


def test_rows_can_be_changed_by_the_caller():
    batch_rows(0, "train", 0, 4, 4)[:] = 0
    assert sorted(batch_rows(0, "train", 0, 4, 4)) == [0, 1, 2, 3]


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch_size=_small,
    groups=st.lists(st.integers(-1, 3), min_size=1, max_size=40),
    epochs=_small,
)
def test_rows_of_a_group_fill_batches_and_each_comes_once_an_epoch(
    seed, batch_size, groups, epochs
):
    order, groups = RowOrder(seed, "train", batch_size, groups), np.asarray(groups)
    steps = -(-epochs * len(groups) // batch_size)
    batches = [order.rows(step) for step in range(steps)]
    epochs_of = np.concatenate(batches)[: epochs * len(groups)].reshape(epochs, len(groups))
    assert (np.sort(epochs_of, axis=1) == np.arange(len(groups))).all()
    again = RowOrder(seed, "train", batch_size, groups)
    assert [again.rows(s).tolist() for s in reversed(range(steps))] == [
        rows.tolist() for rows in batches[::-1]
    ]
    if len(groups) % batch_size == 0:  # no batch reaches into another epoch
        whole = sum(count // batch_size for count in np.unique(groups, return_counts=True)[1])
        each_epoch = np.split(np.asarray(batches), epochs)
        mixed = [sum(len(set(groups[rows])) > 1 for rows in epoch) for epoch in each_epoch]
        assert max(mixed) <= len(groups) // batch_size - whole


def test_batches_of_the_groups_come_in_no_order():
    groups = np.repeat([0, 1], 40)
    firsts = [RowOrder(seed, "train", 4, groups).rows(0) for seed in range(20)]
    assert {group for rows in firsts for group in groups[rows]} == {0, 1}
    order = RowOrder(0, "train", 4, groups)
    of_step = [set(groups[order.rows(step)]) for step in range(20)]
    assert all(len(found) == 1 for found in of_step)
    assert of_step[:10] not in ([{0}] * 10, [{1}] * 10)


def test_what_is_left_of_many_groups_stays_together():
    groups = np.repeat(np.arange(10), 6)
    order = RowOrder(0, "train", 4, groups)
    kinds = sorted(len(set(groups[order.rows(step)])) for step in range(15))
    assert kinds == [1] * 10 + [2] * 5


def test_an_epoch_that_begins_within_a_batch_still_groups_the_others():
    groups = np.repeat([0, 1], 9)  # 18 rows, batches of 4: the second epoch begins 2 into one
    order = RowOrder(1, "train", 4, groups)
    pure = [len(set(groups[order.rows(step)])) == 1 for step in range(9)]
    assert sum(pure[:4]) == 4 and sum(pure[5:]) >= 3


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


def test_buckets_of_lengths():
    assert length_buckets([5, 7, 3, 8]).tolist() == [0, 0, 0, 0]  # all are padded to 8
    assert length_buckets([100, 9, 300, 31, 10, 60, 200, 11]).tolist() == [2, 0, 3, 1, 0, 1, 2, 0]
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(5, 0.6, 1000)).astype(int) + 1
    buckets = length_buckets(lengths)
    counts = np.bincount(buckets)
    assert len(counts) == 4 and counts.min() > 200
    for shorter, longer in itertools.pairwise(range(4)):
        assert lengths[buckets == shorter].max() <= lengths[buckets == longer].min() + 16


def test_shares_of_padding():
    batches = [[BatchShape(3, 8, 2), BatchShape(5, 8, 1)], [BatchShape(9, 16, 4)] * 2]
    allowed = [BatchShape(6, 8, 2), BatchShape(12, 16, 4)]
    found = padding_shares(batches, allowed)
    assert found == {
        "student": pytest.approx(1 - (3 + 5 + 18) / (12 + 24)),
        "teacher": 0.0,
        "targets": pytest.approx(1 - (3 + 8) / (4 + 8)),
    }


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(_small, _small, _small), min_size=1, max_size=4),
    spare=st.tuples(*[st.integers(0, 3)] * 3),
)
def test_padding_keeps_every_row(sizes, spare):
    pairs = [_pair(i, n + s, n + t, n) for i, (s, t, n) in enumerate(sizes)]
    need = longest([shape_of(pair) for pair in pairs])
    shape = BatchShape(*(a + b for a, b in zip(need, spare, strict=True)))
    batch = pad(pairs, shape, pad_id=-7)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))
    assert batch.row_id_B.tolist() == [10 + i for i in range(len(sizes))]

    def check(rows, padded, mask, fill, length):
        assert padded.shape == (len(rows), length)
        assert padded.dtype == np.int32 and mask.dtype == bool and mask.shape == padded.shape
        for row, out, real in zip(rows, padded, mask, strict=True):
            np.testing.assert_array_equal(out[: len(row)], row)
            assert real[: len(row)].all() and not real[len(row) :].any()
            assert (out[len(row) :] == fill).all()

    S, T, N = shape
    students, teachers = [p.student for p in pairs], [p.teacher for p in pairs]
    check([v.ids for v in students], batch.student_tokens_BS, batch.student_mask_BS, -7, S)
    check([v.ids for v in teachers], batch.teacher_tokens_BT, batch.teacher_mask_BT, -7, T)
    check([p.target_ids for p in pairs], batch.target_ids_BN, batch.target_mask_BN, 0, N)
    check([v.at for v in students], batch.student_at_BN, batch.target_mask_BN, 0, N)
    check([v.at for v in teachers], batch.teacher_at_BN, batch.target_mask_BN, 0, N)
