"""One of several processes that share the batches of a feed; started by test_two_processes.py.

    python process_batches.py MODEL OUT COORDINATOR PROCESSES INDEX

Writes which rows of each batch are its own, those that its devices hold, a sum over the rows of
all, what it fetches of them, and what a teacher in each process says of them, but of the first row,
of which it was known; and whether it is to stop, which only the last process is asked to, once.
"""

import json
import os
import pathlib
import sys

import compiling

os.environ["XLA_FLAGS"] = compiling.QUICK

import jax
import jax.numpy as jnp
import numpy as np
from feeds import feed_of
from small_runs import ConstantTeacher

from gkdjax.data.chat_template import load_chat
from gkdjax.parallel.mesh import fetch, holders, make_mesh, shard_rows
from gkdjax.parallel.multihost import Flags
from gkdjax.teachers.scoring import request_targets

STEPS, STOPPED_AT = 5, 2
SAID, KNOWN = 3, 4  # token ids


def _asked(batch, mesh) -> list[int]:
    """The token that comes first in each row, averaged over the row's positions on the devices."""
    cached = jax.tree.map(np.array, ConstantTeacher(KNOWN, stop=0).targets(batch))
    cached.topk.logprobs[1:] = -np.inf  # of the other rows nothing is cached
    names = [str(row) for row in batch.row_id_B]
    found = request_targets(ConstantTeacher(SAID, stop=0), batch, names, cached, mesh)()
    return fetch(jax.jit(lambda ids_BNK: jnp.mean(ids_BNK, (1, 2)))(found.topk.ids)).tolist()


def main(model: str, out: str, coordinator: str, count: str, index: str) -> None:
    jax.distributed.initialize(coordinator, int(count), int(index))
    mesh = make_mesh()
    stopping, is_last = Flags(mesh), int(index) + 1 == int(count)
    feed, found = feed_of(load_chat(model)), []
    for step in range(STEPS):
        batch, _ = feed.batch(step)
        whole = shard_rows(mesh, batch)
        held_by = enumerate(holders(mesh, len(batch.row_id_B)))
        held = [shard.data.ravel().tolist() for shard in whole.row_id_B.addressable_shards]
        found.append(
            {
                "own": [row for row, held in held_by if int(index) in held],
                "held": [row for part in held for row in part],
                "shape": whole.student_tokens_BS.shape,
                "total": int(jax.jit(jnp.sum)(whole.student_tokens_BS)),
                "fetched": fetch(whole.row_id_B).tolist(),
                "asked": _asked(batch, mesh),
                "stops": bool(stopping.any(is_last and step == STOPPED_AT)[0]),
            }
        )
    pathlib.Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
