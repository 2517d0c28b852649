"""What a teacher says of a batch, wherever it works and whatever of it is known already."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gkdjax.data.batching import CachedTargets
from gkdjax.losses.objective import TeacherTargets
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.parallel import multihost
from gkdjax.teachers.base import RemoteTeacher, Teacher
from gkdjax.types import Batch


def steps_ahead(teacher: Teacher) -> int:
    """How many steps it is asked for beside the one that is computed."""
    return 4 if isinstance(teacher, RemoteTeacher) else 0


def request_targets(
    teacher: Teacher, batch: Batch, names: Sequence[str], kept: CachedTargets | None, mesh: Mesh
) -> Callable[[], TeacherTargets]:
    """Asks what a teacher says of a batch -> a function that gives it, on the devices.

    Args:
      teacher: any; one that works elsewhere begins at once, and each process asks it of rows that
        its devices hold: of each row one process.
      batch: NumPy arrays.
      names: of its rows, for errors.
      kept: what it said of some rows when it wrote them: of those it is not asked again.
      mesh: its devices share the rows.
    """
    found = _ask(teacher, batch, names, kept, mesh)
    shared = None if teacher.chat is None else teacher.chat.shared
    return found if shared is None else lambda: dataclasses.replace(found(), shared=shared)


def _ask(
    teacher, batch: Batch, names, kept: CachedTargets | None, mesh
) -> Callable[[], TeacherTargets]:
    if kept is not None:
        if kept.known_B.all():
            return lambda: parallel_mesh.shard_rows(mesh, kept.targets)
        unknown_B1 = ~kept.known_B[:, None]
        batch = dataclasses.replace(batch, target_mask_BN=batch.target_mask_BN & unknown_B1)
    if isinstance(teacher, RemoteTeacher):
        holders = parallel_mesh.holders(mesh, len(names))
        asker_B = np.asarray([held[row % len(held)] for row, held in enumerate(holders)])
        own_B1 = (asker_B == jax.process_index())[:, None]
        batch = dataclasses.replace(batch, target_mask_BN=batch.target_mask_BN & own_B1)
        wait = teacher.ask(batch, names)

        def ready() -> TeacherTargets:
            found = multihost.fail_together(wait)
            if any(len(held) > 1 for held in holders):
                found = multihost.rows_from(asker_B, found)
            return parallel_mesh.shard_rows(mesh, _filled(np, kept, found))

        return ready
    return lambda: _filled(
        jnp, kept and parallel_mesh.shard_rows(mesh, kept), teacher.targets(batch)
    )


def _filled(numpy, kept: CachedTargets | None, found: TeacherTargets) -> TeacherTargets:
    """`found`, but of the rows that were known what was kept of them."""
    if kept is None:
        return found

    def choose(known, new):
        return numpy.where(kept.known_B.reshape(-1, *[1] * (new.ndim - 1)), known, new)

    return jax.tree.map(choose, kept.targets, found)
