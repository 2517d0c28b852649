"""Does the work of a teacher behind HTTP hide behind that of the device?

    JAX_PLATFORMS=cpu python -m gkdjax.benchmarks.work_ahead

A server of this process answers after a fixed time, one request at a time, and the batch is as
large as makes a step take about as long. Each round times, one after the other, the steps alone
(their targets are known), the teacher alone, and both as in a run; every batch is new, and every
answer is written to a store.
"""

import argparse
import contextlib
import dataclasses
import http.server
import json
import pathlib
import statistics
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gkdjax import config
from gkdjax.benchmarks.case import STUDENTS
from gkdjax.benchmarks.shared_prefix import VOCAB, model
from gkdjax.benchmarks.table import GIB
from gkdjax.benchmarks.worker import peak_bytes
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.teachers import scoring
from gkdjax.teachers.server.answers import TeacherAnswer
from gkdjax.teachers.server.connect import declared
from gkdjax.teachers.server.dialects.vllm import PromptLogprobs
from gkdjax.teachers.server.scheduler import Pool
from gkdjax.teachers.server.store.answers import AnswerStore
from gkdjax.teachers.server.store.fingerprint import TeacherIdentity
from gkdjax.teachers.server.store.suspects import Suspects
from gkdjax.teachers.server.teacher import ServerTeacher
from gkdjax.teachers.server.transport.client import Limits, Transport
from gkdjax.train import optimizer as train_optimizer
from gkdjax.train.batches import BatchPrefetcher
from gkdjax.train.step import init_state, make_train_step
from gkdjax.types import Batch
from gkdjax.utils.text import table

_DIVERGENCE = "forward_kl"
_FIRST_ROWS = 4  # of the batch by which the number of rows is found
_PARTS = ("steps alone", "teacher alone", "both")


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
    mesh = parallel_mesh.make_mesh()
    with (
        _server(a.answer_ms / 1000, a.top_k) as base,
        tempfile.TemporaryDirectory() as directory,
        contextlib.closing(_teacher(base, pathlib.Path(directory), a.top_k)) as teacher,
    ):
        bench = _Bench(a, mesh, teacher, pathlib.Path(directory))
        rounds = [bench.round() for _ in range(a.rounds)]
    shown = [[p, f"{1000 * statistics.median(r[p] for r in rounds):.1f}"] for p in _PARTS]
    print(table([f"{bench.rows} rows of {a.length} tokens", "ms a step"], shown))
    ratios = [r["both"] / max(r["steps alone"], r["teacher alone"]) for r in rounds]
    kind, most = peak_bytes()
    print(f"both / the longer one: {statistics.median(ratios):.2f}; {kind} {most / GIB:.2f} GiB")


class _Bench:
    """Student, step and batches."""

    def __init__(
        self,
        a: argparse.Namespace,
        mesh: Mesh,
        teacher: ServerTeacher,
        directory: pathlib.Path,
    ):
        self._a, self._mesh, self._teacher, self._directory = a, mesh, teacher, directory
        self._rng, self._made = np.random.default_rng(0), 0
        decoder, params = model(STUDENTS[a.shape], jnp.dtype("float32"))
        self._config = c = config.Config(gkd=config.Gkd(divergence=_DIVERGENCE))
        optimizer, schedule = (
            train_optimizer.optimizer(c.optim, 1000),
            train_optimizer.schedule(c.optim, 1000),
        )
        self._step = make_train_step(decoder, optimizer, schedule, c, mesh)
        self._state = parallel_mesh.replicate(mesh, init_state(params, optimizer))
        devices = mesh.shape["data"]
        self.rows = -(-_FIRST_ROWS // devices) * devices
        wanted = a.step_ms / 1000 / self._steps_alone() * self.rows
        self.rows = max(round(wanted / devices), 1) * devices
        self._steps_alone()  # compiles, if the rows are others now

    def round(self) -> dict[str, float]:
        """Seconds a step of each part."""
        parts = self._steps_alone, self._teacher_alone, self._both
        return {name: part() for name, part in zip(_PARTS, parts, strict=True)}

    def _steps_alone(self) -> float:
        batch = self._batch()
        targets = scoring.request_targets(self._teacher, batch, _names(batch), None, self._mesh)()
        batch = parallel_mesh.shard_rows(self._mesh, batch)
        jax.block_until_ready(self._take_step(batch, targets))  # compiled, perhaps
        return self._timed(lambda step: self._take_step(batch, targets))

    def _teacher_alone(self) -> float:
        ahead = self._ahead()
        return self._timed(lambda step: ahead.take(step, self._state).targets)

    def _both(self) -> float:
        ahead = self._ahead()

        def step(number: int):
            ready = ahead.take(number, self._state)
            return self._take_step(ready.batch, ready.targets)

        return self._timed(step)

    def _ahead(self) -> BatchPrefetcher:
        dataset = _Dataset([self._batch() for _ in range(self._a.steps)])
        inputs = types.SimpleNamespace(
            config=self._config, mesh=self._mesh, dataset=dataset, anchors={}
        )
        run = types.SimpleNamespace(teacher=self._teacher, inputs=inputs)
        return BatchPrefetcher(run, self._directory, 0, self._a.steps)

    def _take_step(self, batch: Batch, targets) -> dict:
        self._state, sums = self._step(
            self._state, None, batch, targets, {}, divergence=_DIVERGENCE
        )
        return sums

    def _timed(self, step: Callable) -> float:
        """Seconds a step; as in a run, the numbers of one are waited for when the next is begun."""
        before, start = None, time.perf_counter()
        for number in range(self._a.steps):
            made = step(number)
            jax.block_until_ready(before)
            before = made
        jax.block_until_ready(before)
        return (time.perf_counter() - start) / self._a.steps

    def _batch(self) -> Batch:
        """Random tokens that both read; the second half of each row is predicted."""
        B, T = self.rows, self._a.length
        tokens_BT = self._rng.integers(0, VOCAB, (B, T)).astype(np.int32)
        at_N = np.arange(T // 2, T - 1, dtype=np.int32)
        at_BN, mask_BT = np.broadcast_to(at_N, (B, at_N.size)), np.ones((B, T), bool)
        return Batch(
            student_tokens_BS=tokens_BT,
            student_mask_BS=mask_BT,
            student_at_BN=at_BN,
            teacher_tokens_BT=tokens_BT,
            teacher_mask_BT=mask_BT,
            teacher_at_BN=at_BN,
            target_ids_BN=tokens_BT[:, at_N + 1],
            target_mask_BN=np.ones(at_BN.shape, bool),
            row_id_B=np.arange(B, dtype=np.int32),
        )


@dataclasses.dataclass
class _Dataset:
    """Batches as `data.dataset.DistillDataset` has them."""

    batches: Sequence[Batch]

    def batch(self, step: int) -> tuple[Batch, None]:
        return self.batches[step], None

    def names(self, step: int) -> list[str]:
        return _names(self.batches[step])


def _names(batch: Batch) -> list[str]:
    return [f"row {i}" for i in batch.row_id_B]


def _teacher(base: str, directory: pathlib.Path, top_k: int) -> ServerTeacher:
    """As `connect` makes it, of a server that needs no preflight."""
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
        said = [{i: -20.0} | best for i in ids[1:]]
        return [None, *({i: {"logprob": p} for i, p in row.items()} for row in said)]

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
