"""The order of rows, a pure function of the step, and padding.

There is no iterator and so no state to save: step n's rows follow from (seed, purpose, n).
"""

import functools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gkdjax.losses import TopKLogprobs
from gkdjax.types import Batch, TopKTargets, ViewPair


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


class BatchShape(NamedTuple):
    """Padded lengths of a batch."""

    student: int  # S
    teacher: int  # T
    targets: int  # N


def shape_of(pair: ViewPair) -> BatchShape:
    """What one row needs."""
    return BatchShape(len(pair.student.ids), len(pair.teacher.ids), len(pair.target_ids))


def pad(pairs: Sequence[ViewPair], shape: BatchShape, pad_id: int) -> Batch:
    """Right-pads all rows to one shape, which must hold them.

    Returns:
      A Batch of NumPy arrays, rows in the order of `pairs`.
    """
    students, teachers = [p.student for p in pairs], [p.teacher for p in pairs]
    targets = [p.target_ids for p in pairs]
    return Batch(
        student_tokens_BS=_rectangle([v.ids for v in students], shape.student, pad_id),
        student_mask_BS=_mask([v.ids for v in students], shape.student),
        student_at_BN=_rectangle([v.at for v in students], shape.targets, 0),
        teacher_tokens_BT=_rectangle([v.ids for v in teachers], shape.teacher, pad_id),
        teacher_mask_BT=_mask([v.ids for v in teachers], shape.teacher),
        teacher_at_BN=_rectangle([v.at for v in teachers], shape.targets, 0),
        target_ids_BN=_rectangle(targets, shape.targets, 0),
        target_mask_BN=_mask(targets, shape.targets),
        row_id_B=np.asarray([p.row_id for p in pairs], np.int32),
    )


def kept_targets(pairs: Sequence[ViewPair], num_targets: int) -> TopKTargets | None:
    """What the teacher kept of these rows when it wrote them, padded; None if any row has nothing.

    The teacher need not read them again.
    """
    kept = [pair.kept for pair in pairs]
    if any(k is None for k in kept):
        return None
    top, K = [k.topk for k in kept], kept[0].topk.ids.shape[-1]
    topk = TopKLogprobs(
        ids=_block([t.ids for t in top], (num_targets, K), 0),
        logprobs=_block([t.logprobs for t in top], (num_targets, K), -np.inf),
        tail_logprob=_block([t.tail_logprob for t in top], (num_targets,), 0.0),
        temperature=top[0].temperature,
    )
    return TopKTargets(topk, _block([k.target_logprob for k in kept], (num_targets,), 0.0))


@functools.lru_cache(maxsize=8)  # two purposes, two epochs at a border, and some to spare
def _epoch_order(seed: int, purpose: str, epoch: int, num_rows: int) -> np.ndarray:
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), epoch])
    order = np.random.default_rng(entropy).permutation(num_rows)
    order.flags.writeable = False  # it is shared by all callers
    return order


def _rectangle(rows: Sequence[np.ndarray], length: int, fill: int) -> np.ndarray:
    return _block([np.asarray(row, np.int32) for row in rows], (length,), fill)


def _block(rows: Sequence[np.ndarray], shape: tuple[int, ...], fill: float) -> np.ndarray:
    """[B, *shape] in the rows' dtype; each row is filled up along its first axis."""
    padded = np.full((len(rows), *shape), fill, rows[0].dtype)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)] = row
    return padded


def _mask(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    lengths = np.asarray([len(row) for row in rows])
    return np.arange(length)[None, :] < lengths[:, None]
