"""The targets of a batch, wherever the teacher works and whatever is known already."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gkdjax.losses.objective import TeacherTargets, TopKTargets
from gkdjax.parallel.mesh import holders, shard_rows
from gkdjax.parallel.multihost import fail_together, rows_from
from gkdjax.teachers.base import RemoteTeacher, Teacher
from gkdjax.types import Batch


def steps_ahead(teacher: Teacher) -> int:
    """How many steps it is asked for beside the one that is computed."""
    return 4 if isinstance(teacher, RemoteTeacher) else 0


def request_targets(
    teacher: Teacher, batch: Batch, names: Sequence[str], cached: TopKTargets | None, mesh: Mesh
) -> Callable[[], TeacherTargets]:
    """Asks for a teacher's targets -> a function that gives them, on the devices.

    Args:
      teacher: any; one that works elsewhere begins at once.
      batch: NumPy arrays.
      names: of its rows, for errors.
      cached: the targets of rows that the teacher wrote itself: it is not asked about them again;
        see `data.batching.cached_targets`.
      mesh: its devices share the rows.
    """
    known_B = np.zeros(len(names), bool) if cached is None else _known(np, cached)
    batch = _of_rows(batch, ~known_B)
    if known_B.all():
        ready = functools.partial(shard_rows, mesh, cached)
    elif isinstance(teacher, RemoteTeacher):
        ready = _ask(teacher, batch, names, cached, mesh)
    else:

        def ready() -> TeacherTargets:
            return _filled(jnp, cached and shard_rows(mesh, cached), teacher.targets(batch))

    shared = None if teacher.chat is None else teacher.chat.shared
    return ready if shared is None else lambda: dataclasses.replace(ready(), shared=shared)


def _ask(
    teacher: RemoteTeacher, batch: Batch, names: Sequence[str], cached: TopKTargets | None, mesh
) -> Callable[[], TeacherTargets]:
    """Each row is asked for by one of the processes whose devices hold it."""
    held_by = holders(mesh, len(names))
    asker_B = np.asarray([held[row % len(held)] for row, held in enumerate(held_by)])
    wait = teacher.ask(_of_rows(batch, asker_B == jax.process_index()), names)

    def ready() -> TeacherTargets:
        with fail_together():
            found = wait()
        if any(len(held) > 1 for held in held_by):
            found = rows_from(asker_B, found)
        return shard_rows(mesh, _filled(np, cached, found))

    return ready


def _of_rows(batch: Batch, which_B: np.ndarray) -> Batch:
    """The batch with targets in these rows only."""
    return dataclasses.replace(batch, target_mask_BN=batch.target_mask_BN & which_B[:, None])


def _known(numpy, cached: TopKTargets):
    """bool [B]: the rows that have cached targets."""
    return numpy.isfinite(cached.topk.logprobs[:, 0, 0])


def _filled(numpy, cached: TopKTargets | None, found: TeacherTargets) -> TeacherTargets:
    """`found` with the cached targets in the rows that have some."""
    if cached is None:
        return found

    known_B = _known(numpy, cached)

    def choose(known, new):
        return numpy.where(known_B.reshape(-1, *[1] * (new.ndim - 1)), known, new)

    return jax.tree.map(choose, cached, found)
