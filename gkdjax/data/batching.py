"""The order of rows, a pure function of the step, and padding.

There is no iterator and so no state to save: step n's rows follow from (seed, purpose, n) and from
what the rows are.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from gkdjax.data import buckets
from gkdjax.losses.objective import TopKTargets
from gkdjax.losses.topk import TokenTopK, TopKLogprobs
from gkdjax.models import padding
from gkdjax.types import Batch, ViewPair


class RowOrder:
    """Which rows make up the batch of each step.

    One shuffled epoch comes after the other without end, so every row comes once an epoch, and a
    batch may reach from one epoch into the next, or hold several. Within an epoch, rows of one
    group fill batches of their own as far as their number goes; what is left of the groups shares
    batches, with as few groups in each as can be.
    """

    def __init__(self, seed: int, purpose: str, batch_size: int, groups: Sequence[int]):
        """Keeps what the order is a function of.

        Args:
          seed: of the run.
          purpose: keeps the orders of different data apart, as "data.train" and "anchor.data".
          batch_size: rows of a step.
          groups: the group of each row, any numbers.
        """
        self._entropy = [seed, zlib.crc32(purpose.encode())]
        self._batch_size, self._groups = batch_size, np.asarray(groups, np.int64)
        self._epoch_order = functools.lru_cache(maxsize=4)(self._shuffled)  # two at a border

    def rows(self, step: int) -> np.ndarray:
        """The rows of step `step` (from 0): int64 [batch_size] in [0, number of rows)."""
        B = self._batch_size
        epochs, within = np.divmod(np.arange(step * B, (step + 1) * B), len(self._groups))
        rows = np.empty(B, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._epoch_order(int(epoch))[within[here]]
        return rows

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng(np.random.SeedSequence([*self._entropy, epoch]))
        order = rng.permutation(len(self._groups))
        if (self._groups == self._groups[0]).all():
            return order
        # The epoch begins within a batch, unless all epochs before fill whole ones.
        head = -epoch * len(order) % self._batch_size
        return _in_groups(order, self._groups, self._batch_size, min(head, len(order)), rng)


def _in_groups(
    order: np.ndarray, groups: np.ndarray, B: int, head: int, rng: np.random.Generator
) -> np.ndarray:
    """`order` with rows of one group side by side in the batches that begin after `head` rows."""
    batches, rest = [], []
    by_group = order[np.argsort(groups[order], kind="stable")]
    for own in np.split(by_group, np.flatnonzero(np.diff(groups[by_group])) + 1):
        whole = len(own) // B * B
        batches += np.split(own[:whole], whole // B) if whole else []
        rest.append(own[whole:])
    rng.shuffle(batches)
    rng.shuffle(rest)  # by group, still: the fewer in a batch, the better
    rest = np.concatenate(rest)
    while len(rest) < head:
        rest = np.concatenate([rest, batches.pop()])
    first, rest = rest[:head], rest[head:]
    whole = len(rest) // B * B
    batches += np.split(rest[:whole], whole // B) if whole else []
    rng.shuffle(batches)
    return np.concatenate([first, *batches, rest[whole:]])


def length_buckets(lengths: Sequence[int]) -> np.ndarray:
    """The bucket of each row, int64 from 0: shortest rows first, about as many in each.

    There are as many as padded shapes may be; rows whose lengths are rounded up to the same one
    share a bucket.
    """
    rounded = np.asarray([padding.round_up(int(length), ()) for length in lengths])
    parts = np.arange(1, buckets.MOST) / buckets.MOST
    edges = np.unique(np.quantile(rounded, parts, method="higher"))
    return np.searchsorted(edges, rounded)


class BatchShape(NamedTuple):
    """Padded lengths of a batch."""

    student: int  # S
    teacher: int  # T
    targets: int  # N


def shape_of(pair: ViewPair) -> BatchShape:
    """What one row needs."""
    return BatchShape(len(pair.student.ids), len(pair.teacher.ids), len(pair.target_ids))


def padding_shares(
    batches: Sequence[Sequence[BatchShape]], allowed: Sequence[buckets.Shape]
) -> dict[str, float]:
    """How much of the batches is padding: "student", "teacher" and "targets" -> share in [0, 1).

    Args:
      batches: what each row of each batch needs.
      allowed: the padded shapes.
    """
    real = np.sum([need for batch in batches for need in batch], axis=0)
    padded = np.sum(
        [
            len(batch) * np.asarray(buckets.smallest(allowed, buckets.longest(batch)))
            for batch in batches
        ],
        axis=0,
    )
    return dict(zip(BatchShape._fields, (1 - real / padded).tolist(), strict=True))


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


class CachedTargets(NamedTuple):
    """What a teacher said when it wrote the rows of a batch: it need not read those again."""

    targets: TopKTargets  # NumPy
    known_B: np.ndarray  # bool, the rows of which it is true


def kept_targets(pairs: Sequence[ViewPair], num_targets: int) -> CachedTargets | None:
    """What was kept of these rows, padded; None if there is nothing of any."""
    known_B = np.asarray([pair.kept is not None for pair in pairs])
    if not known_B.any():
        return None
    one = next(pair.kept for pair in pairs if pair.kept is not None)
    nothing = jax.tree.map(lambda rows: rows[:0], one)
    rows = [pair.kept or nothing for pair in pairs]
    return CachedTargets(pad_top_k(rows, num_targets), known_B)


def pad_top_k(rows: Sequence[TokenTopK], num_targets: int) -> TopKTargets:
    """Of one K and one temperature -> [B, num_targets, K] in NumPy."""
    top, K = [row.topk for row in rows], rows[0].topk.ids.shape[-1]
    topk = TopKLogprobs(
        ids=_block([t.ids for t in top], (num_targets, K), 0),
        logprobs=_block([t.logprobs for t in top], (num_targets, K), -np.inf),
        tail_logprob=_block([t.tail_logprob for t in top], (num_targets,), 0.0),
        temperature=top[0].temperature,
    )
    return TopKTargets(topk, _block([row.target_logprob for row in rows], (num_targets,), 0.0))


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
