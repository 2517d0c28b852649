"""The order of rows, a pure function of the step, and padding to a few lengths.

There is no iterator and so no state to save: step n's rows follow from (seed, purpose, n).
"""

import functools
import zlib
from collections.abc import Sequence

import numpy as np

from gkdjax.errors import UserError
from gkdjax.types import Batch, View, ViewPair

_SHORTEST_BUCKET = 16


def batch_rows(seed: int, purpose: str, step: int, batch_size: int, num_rows: int) -> np.ndarray:
    """The rows of step `step` (from 0): int64 [batch_size] in [0, num_rows).

    The order is one shuffled epoch after the other without end, so every row comes once an epoch
    and a batch may reach from one epoch into the next, or hold several.

    Args:
      purpose: keeps the orders of different data apart, as "train" and "anchor".
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, within = np.divmod(places, num_rows)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = _epoch_order(seed, purpose, int(epoch), num_rows)[within[here]]
    return rows


def bucket_lengths(max_length: int) -> tuple[int, ...]:
    """16, 32, 48, 64, 96, 128, 192, ... up to `max_length`, which is always the last."""
    lengths, power = [_SHORTEST_BUCKET], 2 * _SHORTEST_BUCKET
    while power < max_length:
        lengths += [power, power * 3 // 2]
        power *= 2
    return (*(length for length in lengths if length < max_length), max_length)


def pad(pairs: Sequence[ViewPair], buckets: Sequence[int], pad_id: int) -> Batch:
    """Right-pads S, T and N each to the smallest bucket that holds the longest row.

    Returns:
      A Batch of NumPy arrays, rows in the order of `pairs`.

    Raises:
      UserError: a row is longer than every bucket.
    """
    students, teachers = [p.student for p in pairs], [p.teacher for p in pairs]
    num_targets = _bucket([len(p.target_ids) for p in pairs], pairs, buckets)
    student_tokens, student_mask = _tokens(students, pairs, buckets, pad_id)
    teacher_tokens, teacher_mask = _tokens(teachers, pairs, buckets, pad_id)
    targets = [p.target_ids for p in pairs]
    return Batch(
        student_tokens_BS=student_tokens,
        student_mask_BS=student_mask,
        student_at_BN=_rectangle([v.at for v in students], num_targets, 0),
        teacher_tokens_BT=teacher_tokens,
        teacher_mask_BT=teacher_mask,
        teacher_at_BN=_rectangle([v.at for v in teachers], num_targets, 0),
        target_ids_BN=_rectangle(targets, num_targets, 0),
        target_mask_BN=_mask(targets, num_targets),
        row_id_B=np.asarray([p.row_id for p in pairs], np.int32),
    )


@functools.lru_cache(maxsize=8)  # two purposes, two epochs at a border, and some to spare
def _epoch_order(seed: int, purpose: str, epoch: int, num_rows: int) -> np.ndarray:
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), epoch])
    order = np.random.default_rng(entropy).permutation(num_rows)
    order.flags.writeable = False  # it is shared by all callers
    return order


def _tokens(
    views: Sequence[View], pairs: Sequence[ViewPair], buckets: Sequence[int], pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    rows = [view.ids for view in views]
    length = _bucket([len(row) for row in rows], pairs, buckets)
    return _rectangle(rows, length, pad_id), _mask(rows, length)


def _bucket(lengths: Sequence[int], pairs: Sequence[ViewPair], buckets: Sequence[int]) -> int:
    longest = max(lengths)
    fitting = [bucket for bucket in buckets if bucket >= longest]
    if not fitting:
        name = pairs[lengths.index(longest)].name
        raise UserError(
            f"{name}: {longest} tokens do not fit the longest of data.bucket_lengths, "
            f"{max(buckets)}; add a longer one, or lower data.max_length"
        )
    return min(fitting)


def _rectangle(rows: Sequence[np.ndarray], length: int, fill: int) -> np.ndarray:
    padded = np.full((len(rows), length), fill, np.int32)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)] = row
    return padded


def _mask(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    lengths = np.asarray([len(row) for row in rows])
    return np.arange(length)[None, :] < lengths[:, None]
