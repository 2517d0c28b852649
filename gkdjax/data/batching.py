"""The order of rows, the padded shapes of batches, and the padding.

The rows of step n are a function of (seed, purpose, n) and of the rows: no iterator has a state to
save. A shape is a tuple of lengths, as (student, teacher, targets), and a program to compile: there
are at most `MOST_SHAPES`, all of them met in the first epoch, each at least as long as the one
before in everything.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from gkdjax.losses.objective import TopKTargets
from gkdjax.losses.topk import TokenTopK, TopKLogprobs
from gkdjax.models.padding import round_up
from gkdjax.types import Batch, ViewPair

MOST_SHAPES = 4

Shape = tuple[int, ...]


class BatchShape(NamedTuple):
    """Padded lengths of a batch."""

    student: int  # S
    teacher: int  # T
    targets: int  # N


class RowOrder:
    """The rows of each step's batch.

    One shuffled epoch follows another; a batch may reach from one into the next. Rows of one group
    (any numbers) fill batches of their own as far as their number goes; the others share batches,
    with as few groups in each as possible. Data of another `purpose` have another order.
    """

    def __init__(self, seed: int, purpose: str, batch_size: int, groups: Sequence[int]):
        self._entropy = [seed, zlib.crc32(purpose.encode())]
        self._batch_size, self._groups = batch_size, np.asarray(groups, np.int64)
        self._epoch_order = functools.lru_cache(maxsize=4)(self._shuffled)

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
        B, groups = self._batch_size, self._groups
        rng = np.random.default_rng(np.random.SeedSequence([*self._entropy, epoch]))
        order = rng.permutation(len(groups))
        if (groups == groups[0]).all():
            return order
        batches, rest = [], []
        by_group = order[np.argsort(groups[order], kind="stable")]
        for group in np.split(by_group, np.flatnonzero(np.diff(groups[by_group])) + 1):
            whole = len(group) // B * B
            batches += np.split(group[:whole], whole // B) if whole else []
            rest.append(group[whole:])
        rng.shuffle(batches)
        rng.shuffle(rest)  # groups stay together
        rest = np.concatenate(rest)
        # The epoch begins within a batch, unless all epochs before it fill whole ones.
        head = min(-epoch * len(order) % B, len(order))
        while len(rest) < head:
            rest = np.concatenate([rest, batches.pop()])
        first, rest = rest[:head], rest[head:]
        whole = len(rest) // B * B
        batches += np.split(rest[:whole], whole // B) if whole else []
        rng.shuffle(batches)
        return np.concatenate([first, *batches, rest[whole:]])


def length_groups(lengths: Sequence[int]) -> np.ndarray:
    """The group of each row among at most `MOST_SHAPES` of about equal size, shortest rows first.

    Rows whose lengths are padded to the same one share a group.
    """
    rounded = np.asarray([round_up(int(length), ()) for length in lengths])
    parts = np.arange(1, MOST_SHAPES) / MOST_SHAPES
    edges = np.unique(np.quantile(rounded, parts, method="higher"))
    return np.searchsorted(edges, rounded)


def shape_of(pair: ViewPair) -> BatchShape:
    """The lengths of one row."""
    return BatchShape(len(pair.student.ids), len(pair.teacher.ids), len(pair.target_ids))


def longest(shapes: Sequence[Shape]) -> Shape:
    """The least shape that holds all of them: (3, 9), (5, 2) -> (5, 9)."""
    return tuple(max(lengths) for lengths in zip(*shapes, strict=True))


def choose_shapes(
    needs: Sequence[Shape], allowed: Sequence[int], most: int = MOST_SHAPES
) -> tuple[Shape, ...]:
    """At most `most` shapes for batches with these needs, each the smallest for one of them.

    The needs, rounded up to the `allowed` lengths (see `round_up`), are sorted by size and cut into
    groups of equal number; a shape holds its group and all groups before it.
    """
    rounded = [tuple(round_up(length, allowed) for length in need) for need in needs]
    rounded.sort(key=lambda shape: (sum(shape), shape))
    chain = [longest(rounded[: -(-len(rounded) * part // most)]) for part in range(1, most + 1)]
    return tuple(dict.fromkeys(chain))


def extend_shapes(
    shapes: Sequence[Shape], needs: Sequence[Shape], allowed: Sequence[int]
) -> tuple[Shape, ...]:
    """The shapes and, if they do not hold all needs of other batches, one more that does."""
    whole = longest([shapes[-1], *needs])
    return (*shapes, *(choose_shapes([whole], allowed) if whole != shapes[-1] else ()))


def smallest(shapes: Sequence[Shape], need: Shape) -> Shape:
    """The first of the shapes that holds `need`; ValueError if none does."""
    for shape in shapes:
        if all(have >= wanted for have, wanted in zip(shape, need, strict=True)):
            return shape
    raise ValueError(f"none of the shapes {list(shapes)} holds {need}")


def padding_shares(
    batches: Sequence[Sequence[BatchShape]], shapes: Sequence[Shape]
) -> dict[str, float]:
    """The share of padding in [0, 1) of "student", "teacher" and "targets".

    `batches` have the lengths of each of their rows; `shapes` are the padded ones.
    """
    real = np.sum([need for batch in batches for need in batch], axis=0)
    padded = sum(len(b) * np.asarray(smallest(shapes, longest(b))) for b in batches)
    return dict(zip(BatchShape._fields, (1 - real / padded).tolist(), strict=True))


def pad(pairs: Sequence[ViewPair], shape: BatchShape, pad_id: int) -> Batch:
    """Right-pads all rows to one shape, which must hold them -> a Batch of NumPy arrays."""
    students, teachers = [p.student for p in pairs], [p.teacher for p in pairs]
    targets = [p.target_ids for p in pairs]
    return Batch(
        student_tokens_BS=_int32([v.ids for v in students], shape.student, pad_id),
        student_mask_BS=_mask([v.ids for v in students], shape.student),
        student_at_BN=_int32([v.at for v in students], shape.targets),
        teacher_tokens_BT=_int32([v.ids for v in teachers], shape.teacher, pad_id),
        teacher_mask_BT=_mask([v.ids for v in teachers], shape.teacher),
        teacher_at_BN=_int32([v.at for v in teachers], shape.targets),
        target_ids_BN=_int32(targets, shape.targets),
        target_mask_BN=_mask(targets, shape.targets),
        row_id_B=np.asarray([p.row_id for p in pairs], np.int32),
    )


def cached_targets(pairs: Sequence[ViewPair], num_targets: int) -> TopKTargets | None:
    """The teacher's predictions while it wrote the rows, in NumPy; None if no row has any.

    All entries of a row without them are absent: their logprobs are -inf.
    """
    known = [pair.cached for pair in pairs if pair.cached is not None]
    if not known:
        return None
    nothing = jax.tree.map(lambda tokens: tokens[:0], known[0])
    return pad_top_k([pair.cached or nothing for pair in pairs], num_targets)


def pad_top_k(rows: Sequence[TokenTopK], num_targets: int) -> TopKTargets:
    """Rows of one K and one temperature -> [B, num_targets, K] in NumPy."""
    top, K = [row.topk for row in rows], rows[0].topk.ids.shape[-1]
    topk = TopKLogprobs(
        ids=_block([t.ids for t in top], (num_targets, K), 0),
        logprobs=_block([t.logprobs for t in top], (num_targets, K), -np.inf),
        tail_logprob=_block([t.tail_logprob for t in top], (num_targets,), 0.0),
        temperature=top[0].temperature,
    )
    return TopKTargets(topk, _block([row.target_logprob for row in rows], (num_targets,), 0.0))


def _int32(rows: Sequence[np.ndarray], length: int, fill: int = 0) -> np.ndarray:
    return _block([np.asarray(row, np.int32) for row in rows], (length,), fill)


def _block(rows: Sequence[np.ndarray], shape: tuple[int, ...], fill: float) -> np.ndarray:
    """[B, *shape] in the rows' dtype; each row is padded along its first axis."""
    padded = np.full((len(rows), *shape), fill, rows[0].dtype)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)] = row
    return padded


def _mask(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    return np.arange(length)[None, :] < np.asarray([len(row) for row in rows])[:, None]
