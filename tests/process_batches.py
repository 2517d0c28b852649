"""One of several processes that share the batches of a feed; started by test_process_batches.py.

    python process_batches.py MODEL COORDINATOR PROCESSES INDEX OUT

Writes which rows of each batch are its own, those that its devices hold, a sum over the rows of
all, what it fetches of them, and what a teacher in each process says of them, but of the first row,
of which it was known; and whether it is to stop, which only the last process is asked to, once.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from feeds import feed_of
from small_runs import ConstantTeacher

from gkdjax.data.batching import CachedTargets
from gkdjax.data.chat_template import load_chat
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.parallel import multihost
from gkdjax.teachers import scoring

STEPS, STOPPED_AT = 5, 2
SAID, KNOWN = 3, 4  # token ids


def _own(mesh, rows: int) -> list[int]:
    held = parallel_mesh.holders(mesh, rows)
    return [row for row in range(rows) if jax.process_index() in held[row]]


def _asked(batch, mesh) -> list[int]:
    """The token that comes first in each row, summed over the row's positions on the devices."""
    kept = jax.tree.map(np.asarray, ConstantTeacher(KNOWN, stop=0).targets(batch))
    first_B = np.arange(len(batch.row_id_B)) == 0
    teacher = ConstantTeacher(SAID, stop=0)
    names = [str(row) for row in batch.row_id_B]
    found = scoring.request_targets(teacher, batch, names, CachedTargets(kept, first_B), mesh)()
    total_B = jax.jit(lambda ids_BNK: jnp.sum(ids_BNK, (1, 2)))(found.topk.ids)
    return (parallel_mesh.fetch(total_B) // batch.target_ids_BN.shape[1]).tolist()


def main(model: str, coordinator: str, count: str, index: str, out: str) -> None:
    jax.distributed.initialize(coordinator, int(count), int(index))
    mesh = parallel_mesh.make_mesh()
    stopping, is_last = multihost.Stopping(mesh), int(index) + 1 == int(count)
    feed = feed_of(load_chat(model))
    found = []
    for step in range(STEPS):
        batch, _ = feed.batch(step)
        whole = parallel_mesh.shard_rows(mesh, batch)
        total = jax.jit(lambda tokens_BS: tokens_BS.sum())(whole.student_tokens_BS)
        held = [shard.data.ravel().tolist() for shard in whole.row_id_B.addressable_shards]
        found.append(
            {
                "own": _own(mesh, len(batch.row_id_B)),
                "held": [row for part in held for row in part],
                "shape": whole.student_tokens_BS.shape,
                "total": int(total),
                "fetched": parallel_mesh.fetch(whole.row_id_B).tolist(),
                "asked": _asked(batch, mesh),
                "stops": stopping.asked(is_last and step == STOPPED_AT),
            }
        )
    pathlib.Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
