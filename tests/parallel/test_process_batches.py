"""Batches of one feed, shared by two processes that see each other's devices."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import compiling
import numpy as np
from feeds import feed_of

from gkdjax.data.chat_template import load_chat

HERE = pathlib.Path(__file__).parents[1]
STEPS = 5


def test_two_processes_share_each_batch(student, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.QUICK}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    command = sys.executable, HERE / "process_batches.py"
    running = [
        subprocess.Popen(
            [*command, student, coordinator, "2", str(i), tmp_path / f"{i}.json"], env=environment
        )
        for i in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    parts = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    alone = feed_of(load_chat(student))
    for step in range(STEPS):
        whole, _ = alone.batch(step)
        found = [part[step] for part in parts]
        halves = [half.tolist() for half in np.split(whole.row_id_B, 2)]
        assert [f["held"] for f in found] == halves
        assert [f["own"] for f in found] == [[0, 1], [2, 3]]
        assert all(f["fetched"] == whole.row_id_B.tolist() for f in found)
        assert all(f["shape"] == list(whole.student_tokens_BS.shape) for f in found)
        assert all(f["asked"] == [4, 3, 3, 3] for f in found)
        assert [f["stops"] for f in found] == [step == 3] * 2  # both, a step after one was asked
        assert {f["total"] for f in found} == {int(whole.student_tokens_BS.sum())}
