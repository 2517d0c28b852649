"""python tests/server_kills.py DIR [--kills=30] [--seed=0]: trainers killed beside their server.

The server lives here, and sees what is asked. A trainer is killed with SIGKILL shortly after it was
given some number of answers, and the same command goes on; an answer that was in the store when its
trainer was killed must not be asked for again, and the weights must be those of a run that nobody
killed. DIR is made and kept.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable

import factories
import numpy as np
import server_config
from fake_server import FakeServer, Reply, Request
from fake_teacher import FakeTeacher
from resume_runs import ROOT
from server_runs import rows_asked

from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest
from gkdjax.teachers.server.store.answers import AnswerStore
from gkdjax.teachers.server.store.fingerprint import TeacherIdentity, sample_key, score_key
from gkdjax.types import SamplingParams
from gkdjax.utils.text import table

KEY = "canary-0815-sesame-0815"
_LONGEST_TEXT = 16  # targets of a row, more than there are


@dataclasses.dataclass(frozen=True)
class Kill:
    """What was there when a trainer was killed."""

    answers: int  # that it was given, without the preflight's
    stored: int  # in the store by then
    asked: int  # rows, over all attempts by then
    step: int  # lines of metrics.jsonl


class Counting(FakeTeacher):
    """Calls a function before it gives some answer, counted from when it was told which."""

    def __post_init__(self):
        super().__post_init__()
        self.reached = lambda: None
        self._left = 0

    def stop_at(self, number: int, reached: Callable[[], None]) -> None:
        with self._lock:
            self._left, self.reached = number, reached

    def __call__(self, request: Request) -> Reply:
        reply = super().__call__(request)
        with self._lock:
            self._left -= 1
            now = self._left == 0
        if now:
            self.reached()
        return reply


class KilledRuns:
    """Runs of one config, beside one server."""

    def __init__(self, base: pathlib.Path):
        """Makes the student in `base`, which also holds what was compiled."""
        self._base = base
        self._student = factories.model_dir(base / "student")
        self._teacher = Counting()
        self.server = FakeServer(self._teacher)
        self.command_lines: set[bytes] = set()
        self._preflight: int | None = None  # requests; seen by the first run that is finished
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        self._environment = environment | {
            server_config.KEY_VARIABLE: KEY,
            "JAX_COMPILATION_CACHE_DIR": str(base / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def finish(self, workdir: pathlib.Path) -> None:
        """Runs, or continues, to the end."""
        process = self._start(workdir)
        try:
            code = process.wait(timeout=600)
        finally:
            process.kill()
        assert code == 0, self.log(workdir).read_text()[-5000:]
        if self._preflight is None:
            stored = self._stored_rows(workdir)
            asked = (set(rows_asked([request])) for request in self.server.requests)
            self._preflight = next(i for i, rows in enumerate(asked) if rows & stored)

    def kill(self, workdir: pathlib.Path, answers: int, delay: float) -> bool:
        """Kills a trainer `delay` seconds after so many answers -> False if it was over before.

        Without a delay the last of them is still on its way.
        """
        started, reached = threading.Event(), threading.Event()

        def hit() -> None:
            started.wait()
            self.command_lines.add(pathlib.Path(f"/proc/{process.pid}/cmdline").read_bytes())
            if not delay:
                process.kill()
            reached.set()

        self._teacher.stop_at(answers, hit)
        process = self._start(workdir)
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
        return code != 0

    def kill_many(self, workdir: pathlib.Path, moments: Iterable[tuple[int, float]]) -> list[Kill]:
        """Kills and goes on until the run is over, and checks what is asked meanwhile.

        Args:
          workdir: of the run.
          moments: of each kill, the answers before it, without the preflight's, and the delay.
        """
        began, found, stored = len(self.server.requests), [], set()
        for answers, delay in moments:
            asked_before = len(self.server.requests)
            killed = self.kill(workdir, self._preflight + answers, delay)
            self._check_not_again(asked_before, stored)
            stored = self._stored_rows(workdir)
            if not killed:
                return found
            asked = len(rows_asked(self.server.requests[began:]))
            found.append(Kill(answers, len(stored), asked, _steps(workdir)))
        asked_before = len(self.server.requests)
        self.finish(workdir)
        self._check_not_again(asked_before, stored)
        return found

    def log(self, workdir: pathlib.Path) -> pathlib.Path:
        """All that its trainers have said."""
        return workdir.with_name(workdir.name + ".log")

    def _start(self, workdir: pathlib.Path) -> subprocess.Popen:
        config = pathlib.Path(server_config.__file__)
        command = [
            *(sys.executable, "-m", "gkdjax.main", f"--workdir={workdir}"),
            f"--config={config}:{self._student},{self.server.base}",
        ]
        with self.log(workdir).open("a") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=self._environment
            )

    def _check_not_again(self, asked_before: int, stored: set[str]) -> None:
        again = stored & set(rows_asked(self.server.requests[asked_before:]))
        assert not again, f"in the store, and asked for again: {sorted(again)[:3]}"

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


def _steps(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def outcome(workdir: pathlib.Path) -> dict[str, object]:
    """What has to be equal: weights and text as bytes, and every loss."""
    paths = [workdir / "merged/model.safetensors", *workdir.glob("trajectories_*.jsonl")]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths} | {
        "losses": [json.loads(line)["loss"].hex() for line in lines]
    }


def moments(draw: random.Random, kills: int) -> list[tuple[int, float]]:
    """For `KilledRuns.kill_many`; half of them while an answer is on its way."""
    delays = (0.0, 0.0, 0.02, 0.5)
    return [(draw.randint(1, 5), draw.choice(delays) * draw.random()) for _ in range(kills)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    base, draw = arguments.directory.absolute(), random.Random(arguments.seed)
    base.mkdir(parents=True, exist_ok=True)
    runs, left, lines, unequal = KilledRuns(base), arguments.kills, [], 0
    with runs.server:
        runs.finish(base / "whole")
        wanted = outcome(base / "whole")
        while left > 0:
            workdir = base / f"killed-{len(lines)}"
            kills = runs.kill_many(workdir, moments(draw, min(left, 6)))
            left -= len(kills)
            same = outcome(workdir) == wanted
            unequal += not same
            steps = " ".join(str(kill.step) for kill in kills)
            rows = " ".join(f"{kill.stored}/{kill.asked}" for kill in kills)
            lines.append([workdir.name, str(len(kills)), steps, rows, "yes" if same else "no"])
            print(*lines[-1], sep="  ", flush=True)
    print(table(["run", "kills", "killed at step", "rows stored/asked", "equal"], lines))
    sys.exit(unequal > 0)


if __name__ == "__main__":
    main()
