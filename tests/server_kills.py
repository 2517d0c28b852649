"""python tests/server_kills.py DIR [--kills=30] [--seed=0]: trainers killed beside their server.

The server lives here, and sees what is asked. A trainer is killed with SIGKILL shortly after it was
given some number of answers, and the same command goes on; an answer that was in the store when its
trainer was killed must not be asked for again, and the weights must be those of a run that nobody
killed. DIR is made and kept.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from typing import NamedTuple

import factories
import numpy as np
import server_config
from fake_server import FakeServer
from fake_teacher import FakeTeacher
from resume_runs import ROOT
from server_runs import rows_asked

from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest
from gkdjax.teachers.server.store.answers import AnswerStore
from gkdjax.teachers.server.store.fingerprint import TeacherIdentity, sample_key, score_key
from gkdjax.types import SamplingParams

KEY = "canary-0815-sesame-0815"
_LONGEST_TEXT = 16  # targets of a row, more than there are


class Kill(NamedTuple):
    """What was there when a trainer was killed."""

    stored: int  # rows in the store by then
    asked: int  # rows, over all attempts by then
    step: int  # lines of metrics.jsonl


class KilledRuns:
    """Runs of one config, beside one server."""

    def __init__(self, base: pathlib.Path):
        """Makes the student in `base`, which also holds what was compiled."""
        self._student = factories.model_dir(base / "student")
        self._teacher = FakeTeacher()
        self.server = FakeServer(self._answer)
        self.command_lines: set[bytes] = set()
        self._preflight = 0  # requests; seen by `whole`
        self._left, self._reached = 0, lambda: None  # answers until it is called
        self._lock = threading.Lock()
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        self._environment = environment | {
            server_config.KEY_VARIABLE: KEY,
            "JAX_COMPILATION_CACHE_DIR": str(base / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def whole(self, workdir: pathlib.Path) -> None:
        """A run that nobody kills, the first of all."""
        assert self._run(workdir)
        stored = self._stored_rows(workdir)
        asked = (set(rows_asked([request])) for request in self.server.requests)
        self._preflight = next(i for i, rows in enumerate(asked) if rows & stored)

    def kill_many(self, workdir: pathlib.Path, moments: Iterable[tuple[int, float]]) -> list[Kill]:
        """Kills and goes on until the run is over, and checks what is asked meanwhile.

        Args:
          workdir: of the run.
          moments: of each kill, the answers before it, without the preflight's, and the seconds
            after them; without seconds the last of them is still on its way.
        """
        began, kills, stored = len(self.server.requests), [], set()
        for answers, delay in [*moments, (10**9, 0.0)]:
            before = len(self.server.requests)
            is_over = self._run(workdir, self._preflight + answers, delay)
            again = stored & set(rows_asked(self.server.requests[before:]))
            assert not again, f"in the store, and asked for again: {sorted(again)[:3]}"
            if is_over:
                break
            stored, lines = self._stored_rows(workdir), workdir / "metrics.jsonl"
            step = len(lines.read_text().splitlines()) if lines.exists() else 0
            kills.append(Kill(len(stored), len(rows_asked(self.server.requests[began:])), step))
        return kills

    def log(self, workdir: pathlib.Path) -> pathlib.Path:
        """All that its trainers have said."""
        return workdir.with_name(workdir.name + ".log")

    def _answer(self, request):
        reply = self._teacher(request)
        with self._lock:
            self._left -= 1
            now = self._left == 0
        if now:
            self._reached()
        return reply

    def _run(self, workdir: pathlib.Path, answers: int = 0, delay: float = 0.0) -> bool:
        """Runs or continues, and kills after so many answers; 0: never -> whether it is over."""
        started, reached = threading.Event(), threading.Event()

        def hit() -> None:
            started.wait()
            if not delay:
                process.kill()
            reached.set()

        with self._lock:
            self._left, self._reached = answers, hit
        config = f"{server_config.__file__}:{self._student},{self.server.base}"
        command = [sys.executable, "-m", "gkdjax.main", f"--workdir={workdir}"]
        with self.log(workdir).open("a") as log:
            how = {"stdout": log, "stderr": log, "cwd": ROOT, "env": self._environment}
            process = subprocess.Popen([*command, f"--config={config}"], **how)
        self.command_lines.add(pathlib.Path(f"/proc/{process.pid}/cmdline").read_bytes())
        started.set()
        try:
            while not reached.wait(0.05) and process.poll() is None:
                pass
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=delay)
        finally:
            process.kill()
        code = process.wait()
        assert code in (0, -signal.SIGKILL), self.log(workdir).read_text()[-5000:]
        return code == 0

    def _stored_rows(self, workdir: pathlib.Path) -> set[str]:
        """Those of all rows that were asked so far whose answers are in the store."""
        path = workdir / "answers.sqlite"
        if not path.exists():
            return set()
        with AnswerStore(path) as store:
            known, keys = store.teachers(), {stored.key for stored in store.all()}
        asked = set(rows_asked(self.server.requests))
        found = {row for row in asked if keys & _keys(known[0], json.loads(row))}
        assert len(found) >= len(keys), "an answer in the store is to nothing that was asked"
        return found


def _keys(known: TeacherIdentity, row: dict) -> set[str]:
    """Of all requests that a row may have been sent for: the positions asked of it are not sent."""
    ids = np.asarray(row["prompt"], np.int32)
    if "prompt_logprobs" not in row:
        sampling = SamplingParams(row["max_tokens"], row["temperature"], row["top_p"])
        stops = tuple(row["stop_token_ids"])
        request = SampleRequest("", ids, (), sampling, row["seed"], stops, row["logprobs"])
        return {sample_key(known, request, by_messages=False)}
    last = len(ids) - 1
    return {
        score_key(known, ScoreRequest("", ids, np.arange(first, last), row["prompt_logprobs"]))
        for first in range(max(last - _LONGEST_TEXT, 0), last)
    }


def outcome(workdir: pathlib.Path) -> dict[str, object]:
    """What has to be equal: weights and text as bytes, and every loss."""
    paths = [workdir / "merged/model.safetensors", *workdir.glob("trajectories_*.jsonl")]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths} | {
        "losses": [json.loads(line)["loss"].hex() for line in lines]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    base, draw = arguments.directory.absolute(), random.Random(arguments.seed)
    base.mkdir(parents=True, exist_ok=True)
    runs, left, number, unequal = KilledRuns(base), arguments.kills, 0, 0
    with runs.server:
        runs.whole(base / "whole")
        while left > 0:
            workdir = base / f"killed-{number}"
            delays = [draw.choice((0.0, 0.0, 0.02, 0.5)) for _ in range(min(left, 6))]
            moments = [(draw.randint(1, 5), delay * draw.random()) for delay in delays]
            kills = runs.kill_many(workdir, moments)
            equal = outcome(workdir) == outcome(base / "whole")
            left, number, unequal = left - len(kills), number + 1, unequal + (not equal)
            print(workdir.name, "equal" if equal else "NOT EQUAL", *kills, sep="  ", flush=True)
    sys.exit(unequal > 0)


if __name__ == "__main__":
    main()
