"""One of several processes that share the batches of a feed; started by test_process_batches.py.

    python process_batches.py MODEL COORDINATOR PROCESSES INDEX OUT

Writes the rows that it brings, those that its devices hold, and a sum over the rows of all.
"""

import json
import pathlib
import sys

import jax
import numpy as np
from feeds import feed_of
from jax.sharding import Mesh

from gkdjax import sharding
from gkdjax.data.chat import load_chat

STEPS = 5


def main(model: str, coordinator: str, processes: str, index: str, out: str) -> None:
    jax.distributed.initialize(coordinator, int(processes), int(index))
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    feed = feed_of(load_chat(model))
    found = []
    for step in range(STEPS):
        batch, _ = feed.batch(step)
        whole = sharding.shard_rows(mesh, batch)
        total = jax.jit(lambda tokens_BS: tokens_BS.sum())(whole.student_tokens_BS)
        held = [shard.data.ravel().tolist() for shard in whole.row_id_B.addressable_shards]
        found.append(
            {
                "brought": batch.row_id_B.tolist(),
                "held": [row for part in held for row in part],
                "shape": whole.student_tokens_BS.shape,
                "total": int(total),
            }
        )
    pathlib.Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
