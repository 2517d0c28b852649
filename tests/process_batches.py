"""One of several processes that share the batches of a feed; started by test_process_batches.py.

    python process_batches.py MODEL COORDINATOR PROCESSES INDEX OUT

Writes which rows of each batch are its own, those that its devices hold, a sum over the rows of
all, and what it fetches of them.
"""

import json
import pathlib
import sys

import jax
from feeds import feed_of

from gkdjax import sharding
from gkdjax.data.chat import load_chat

STEPS = 5


def _own(mesh, rows: int) -> list[int]:
    held = sharding.holders(mesh, rows)
    return [row for row in range(rows) if jax.process_index() in held[row]]


def main(model: str, coordinator: str, processes: str, index: str, out: str) -> None:
    jax.distributed.initialize(coordinator, int(processes), int(index))
    mesh = sharding.make_mesh()
    feed = feed_of(load_chat(model))
    found = []
    for step in range(STEPS):
        batch, _ = feed.batch(step)
        whole = sharding.shard_rows(mesh, batch)
        total = jax.jit(lambda tokens_BS: tokens_BS.sum())(whole.student_tokens_BS)
        held = [shard.data.ravel().tolist() for shard in whole.row_id_B.addressable_shards]
        found.append(
            {
                "own": _own(mesh, len(batch.row_id_B)),
                "held": [row for part in held for row in part],
                "shape": whole.student_tokens_BS.shape,
                "total": int(total),
                "fetched": sharding.fetch(whole.row_id_B).tolist(),
            }
        )
    pathlib.Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
