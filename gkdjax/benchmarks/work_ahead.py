"""Does the work of a teacher behind HTTP hide behind that of the device?

    JAX_PLATFORMS=cpu python -m gkdjax.benchmarks.work_ahead

A server of this process answers after a fixed time, one request at a time, and the batch is as
large as makes a step take about as long. Each round times, one after the other, the steps alone
(their targets are known), the teacher alone, and both as in a run; every batch is new, and every
answer is written to a store.
"""

import argparse
import contextlib
import http.server
import itertools
import json
import pathlib
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator

import jax
import numpy as np

from gkdjax import config
from gkdjax.benchmarks import harness
from gkdjax.benchmarks.models import STUDENTS, decoder_spec, random_batch, random_model
from gkdjax.parallel.mesh import make_mesh, replicate, shard_rows
from gkdjax.teachers import scoring
from gkdjax.teachers.server.answers import TeacherAnswer
from gkdjax.teachers.server.connect import declared
from gkdjax.teachers.server.dialects.vllm import PromptLogprobs
from gkdjax.teachers.server.scheduler import Pool, Suspects
from gkdjax.teachers.server.store.answers import AnswerStore
from gkdjax.teachers.server.store.fingerprint import TeacherIdentity
from gkdjax.teachers.server.teacher import ServerTeacher
from gkdjax.teachers.server.transport.client import Limits, Transport
from gkdjax.train import optimizer as train_optimizer
from gkdjax.train.batches import BatchPrefetcher
from gkdjax.train.step import init_state, make_train_step
from gkdjax.types import Batch
from gkdjax.utils.text import table

VOCAB = 1024
_DIVERGENCE = "forward_kl"
_FIRST_ROWS = 4  # of the batch by which the number of rows is found


def main() -> None:
    parser = argparse.ArgumentParser("work_ahead", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=STUDENTS, default="small", help="Of the student.")
    parser.add_argument("--answer_ms", type=float, default=50.0, help="Until the server answers.")
    parser.add_argument("--step_ms", type=float, default=50.0, help="About, of a step.")
    parser.add_argument("--length", type=int, default=32, help="Tokens of a row.")
    parser.add_argument("--top_k", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40, help="Of each part of a round.")
    parser.add_argument("--rounds", type=int, default=5, help="Timed.")
    a = parser.parse_args()
    with (
        _server(a.answer_ms / 1000, a.top_k) as base,
        tempfile.TemporaryDirectory() as directory,
        contextlib.closing(_teacher(base, pathlib.Path(directory), a.top_k)) as teacher,
    ):
        bench = _Bench(a, teacher, pathlib.Path(directory))
        parts = {"steps alone": bench.steps, "teacher alone": bench.teacher, "both": bench.both}
        results = harness.rounds(parts, a.rounds)
    shown = [[part, f"{1000 * harness.median(found):.1f}"] for part, found in results.items()]
    print(table([f"{bench.rows} rows of {a.length} tokens", "ms a step"], shown))
    alone = zip(results["steps alone"], results["teacher alone"], strict=True)
    longer = [max(pair, key=lambda one: one["seconds"]) for pair in alone]
    kind, most = harness.peak_bytes()
    ratio = harness.median(results["both"], over=longer)
    print(f"both / the longer one: {ratio:.2f}; {kind} {most / harness.GIB:.2f} GiB")


class _Bench:
    """Student, step and batches; a measurement is seconds a step."""

    def __init__(self, a: argparse.Namespace, teacher: ServerTeacher, directory: pathlib.Path):
        self._a, self._mesh, self._teacher, self._directory = a, make_mesh(), teacher, directory
        self._seeds = itertools.count()
        decoder, params = random_model(decoder_spec(STUDENTS[a.shape], VOCAB), "float32")
        self._config = c = config.Config(gkd=config.Gkd(divergence=_DIVERGENCE))
        optimizer = train_optimizer.optimizer(c.optim, 1000)
        schedule = train_optimizer.schedule(c.optim, 1000)
        self._step = make_train_step(decoder, optimizer, schedule, c, self._mesh)
        self._state = replicate(self._mesh, init_state(params, optimizer))
        devices = self._mesh.shape["data"]
        self.rows = -(-_FIRST_ROWS // devices) * devices
        wanted = a.step_ms / 1000 / self.steps()["seconds"] * self.rows
        self.rows = max(round(wanted / devices), 1) * devices
        self.steps()  # compiles, if the rows are others now

    def steps(self) -> dict[str, float]:
        batch = self._batch()
        targets = scoring.request_targets(self._teacher, batch, _names(batch), None, self._mesh)()
        batch = shard_rows(self._mesh, batch)
        jax.block_until_ready(self._take_step(batch, targets))  # compiled, perhaps
        return self._timed(lambda step: self._take_step(batch, targets))

    def teacher(self) -> dict[str, float]:
        return self._ahead(lambda ready: ready.targets)

    def both(self) -> dict[str, float]:
        return self._ahead(lambda ready: self._take_step(ready.batch, ready.targets))

    def _batch(self) -> Batch:
        T = self._a.length
        return random_batch(next(self._seeds), VOCAB, self.rows, T, T // 2, T - 1)

    def _ahead(self, use: Callable) -> dict[str, float]:
        """Uses new batches as a run has them, none of which the student writes."""
        batches = [self._batch() for _ in range(self._a.steps)]
        dataset = types.SimpleNamespace(
            batch=lambda step: (batches[step], None), names=lambda step: _names(batches[step])
        )
        inputs = types.SimpleNamespace(
            config=self._config, mesh=self._mesh, dataset=dataset, anchors={}
        )
        run = types.SimpleNamespace(teacher=self._teacher, inputs=inputs)
        ahead = BatchPrefetcher(run, self._directory, 0, self._a.steps)
        return self._timed(lambda step: use(ahead.take(step, self._state)))

    def _take_step(self, batch: Batch, targets) -> dict:
        arguments = self._state, None, batch, targets, {}
        self._state, sums = self._step(*arguments, divergence=_DIVERGENCE)
        return sums

    def _timed(self, step: Callable) -> dict[str, float]:
        """Waits for the numbers of a step when the next one is begun, as a run does."""
        before, start = None, time.perf_counter()
        for number in range(self._a.steps):
            made = step(number)
            jax.block_until_ready(before)
            before = made
        jax.block_until_ready(before)
        return {"seconds": (time.perf_counter() - start) / self._a.steps}


def _names(batch: Batch) -> list[str]:
    return [f"row {i}" for i in batch.row_id_B]


def _teacher(base: str, directory: pathlib.Path, top_k: int) -> ServerTeacher:
    """The teacher that `connect` would make, of a server that needs no preflight."""
    zero = np.zeros(1, np.float32)
    tops = np.zeros((1, top_k), np.int32), np.zeros((1, top_k), np.float32)
    probe = TeacherAnswer(zero.astype(np.int32), zero, *tops, zero)
    known = TeacherIdentity("0" * 64, "benchmark", "0" * 64, probe, {}, "")
    store = AnswerStore(directory / "answers.sqlite")
    store.add_teacher(known)
    limits = Limits(timeout_s=60.0, deadline_s=60.0, max_retries=0)
    transport = Transport(base, "", limits, trust_env=False)
    dialect = PromptLogprobs(known.model, VOCAB, None)
    pool = Pool(
        *(dialect, transport, store, known, Suspects(directory / "suspects.json")),
        probe=lambda: probe,
        concurrency=1,
        max_unreadable=0.0,
    )
    return ServerTeacher(
        pool=pool,
        chat=None,
        description="a benchmark",
        capabilities=declared(config.Teacher(top_k=top_k)),
        top_k=top_k,
        template_kwargs={},
    )


@contextlib.contextmanager
def _server(seconds: float, top_k: int) -> Iterator[str]:
    """Its address; it gives every position the same best tokens, after so long."""
    best = {i: -np.log(top_k) - 0.1 for i in range(top_k)}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self):
            began = time.monotonic()
            prompts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
            choices = [{"index": i, "prompt_logprobs": rows(p)} for i, p in enumerate(prompts)]
            data = json.dumps({"choices": choices}).encode()
            time.sleep(max(seconds - (time.monotonic() - began), 0.0))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format, *args):
            pass

    def rows(ids: list[int]) -> list[dict | None]:
        known = [{i: -20.0} | best for i in ids[1:]]
        return [None, *({i: {"logprob": p} for i, p in row.items()} for row in known)]

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    main()
