"""Runs that are killed and continued, as a user would: what to wait for, what must be equal.

All processes share one persistent compilation cache, so that a restart does not compile anew. The
uninterrupted run comes first: that it is equal shows, too, that a cached program gives the same
bits as one that was just compiled.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import factories
import resume_config

ROOT = pathlib.Path(__file__).parents[1]
# What one can wait for, in the order of a run -> the files that show it, and the least number of
# lines or of new ones.
STAGES = {
    "writing text": ("trajectories_train.jsonl", 8),
    "nothing saved": ("metrics.jsonl", 1),
    "saving": ("checkpoints/*.orbax-checkpoint-tmp", 1),
    "evaluating": ("metrics.jsonl", 3 * resume_config.EVAL_EVERY),
    "exporting": ("eval.jsonl", resume_config.STEPS // resume_config.EVAL_EVERY + 1),
}
_OF_THE_PROCESS = {"tokens_per_second", "compilations", "seconds"}


def make_models(directory: pathlib.Path) -> None:
    """The model that `resume_config` names."""
    factories.model_dir(directory / "student")


class Moment(NamedTuple):
    """When to kill: `delay` seconds after a stage was reached, or after the start (None).

    The stage does not count before so many `steps` are in metrics.jsonl.
    """

    stage: str | None
    delay: float
    steps: int = 0


class Kill(NamedTuple):
    """What a kill hit, and how the next attempt went on."""

    moment: Moment
    lines: int  # of metrics.jsonl
    saved: int  # newest whole checkpoint, 0 without any
    resumed_at: int | None  # steps whose lines the next attempt kept; None: it had not begun


class KilledRun:
    """A run of one setting that is started as often as needed; its output is beside `workdir`.

    `base` holds "models", as `make_models` makes them, and the caches.
    """

    def __init__(self, setting: str, base: pathlib.Path, workdir: pathlib.Path, devices: int = 1):
        self.workdir, self.log = workdir, workdir.with_name(workdir.name + ".log")
        config = f"{ROOT}/tests/resume_config.py:{setting},{base / 'models'}"
        command = [sys.executable, "-m", "gkdjax.main", f"--workdir={workdir}"]
        self._command = [*command, f"--config={config}"]
        self._environment = os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "JAX_COMPILATION_CACHE_DIR": str(base / "cache" / setting),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }

    def start(self) -> subprocess.Popen:
        with self.log.open("a") as log:
            how = {"stdout": log, "stderr": log, "cwd": ROOT, "env": self._environment}
            return subprocess.Popen(self._command, **how)

    def end(self, process: subprocess.Popen, timeout: float) -> bool:
        """Kills after so many seconds -> whether the run was over before."""
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
        finally:
            process.kill()  # SIGKILL, if it still runs
        code = process.wait()
        assert code in (0, -signal.SIGKILL), self.log.read_text()[-5000:]
        return code == 0

    def finish(self) -> None:
        """Runs, or continues, to the end."""
        assert self.end(self.start(), timeout=600), f"{self.workdir} did not end"

    def kill_all(self, moments) -> list[Kill]:
        """Kills at each of the moments in turn, then runs to the end; ends early if the run does.

        An attempt has to go on from the newest checkpoint, no earlier and no later.
        """
        kills: list[Kill] = []
        for moment in [*moments, None]:
            before, opened = whole_lines(self._metrics), self._opened()
            over = self.finish() if moment is None else self._kill_at(moment)
            lines = whole_lines(self._metrics)
            if kills and self._opened() != opened:  # it has restored its state
                kept = common_start(before, lines)
                kills[-1] = kills[-1]._replace(resumed_at=kept)
                # Every line has a time in it: a step that is made again does not give the same one.
                assert kept == kills[-1].saved, kills
                assert not list(self.workdir.glob("checkpoints/*.damaged")), kills
            if over or moment is None:
                return kills
            kills.append(Kill(moment, len(lines), saved(self.workdir), None))
        return kills

    def _kill_at(self, moment: Moment) -> bool:
        """Runs until `moment` -> whether the run was over before it."""
        left, began, process = self._begun(), time.monotonic(), self.start()
        try:
            while process.poll() is None and not self._reached(moment, left):
                time.sleep(0.005)
                assert time.monotonic() - began < 600, f"{moment} did not come"
        finally:
            over = self.end(process, moment.delay)
        return over

    def _reached(self, moment: Moment, left: set) -> bool:
        if moment.stage is None:
            return True
        pattern, least = STAGES[moment.stage]
        if len(whole_lines(self._metrics)) < moment.steps:
            return False
        if pattern.endswith("tmp"):  # what a killed save left behind stays until a run starts
            return len(self._begun() - left) >= least
        return len(whole_lines(self.workdir / pattern)) >= least

    def _begun(self) -> set[tuple[str, int]]:
        """Saves under way."""
        found = set()
        for path in self.workdir.glob(STAGES["saving"][0]):
            with contextlib.suppress(FileNotFoundError):  # it has just got its name
                found.add((path.name, path.stat().st_ctime_ns))
        return found

    @property
    def _metrics(self) -> pathlib.Path:
        return self.workdir / "metrics.jsonl"

    def _opened(self) -> int | None:
        """The file's inode: a resumed run replaces the file before it goes on."""
        return self._metrics.stat().st_ino if self._metrics.exists() else None


def saved(workdir: pathlib.Path) -> int:
    """The newest checkpoint that is whole; 0 if there is none."""
    names = [path.name for path in workdir.glob("checkpoints/*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def whole_lines(path: pathlib.Path) -> list[str]:
    """Without one that is being written; [] if there is no file."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def common_start(one: list, other: list) -> int:
    """How many items are the same from the first on."""
    same = [a == b for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


def differences(whole: pathlib.Path, killed: pathlib.Path) -> list[str]:
    """What is not equal to the bit in two finished runs, each with its first place; [] is good."""
    wanted, got = outcome(whole), outcome(killed)
    if wanted.keys() != got.keys():
        return [f"one run alone has {sorted(wanted.keys() ^ got.keys())}"]
    found = []
    for name, items in wanted.items():
        place = common_start(items, got[name])
        if items != got[name]:
            both = (str(x[place : place + 1])[:300] for x in (items, got[name]))
            found.append(f"{name}, item {place}: " + " and ".join(both))
    return found


def outcome(workdir: pathlib.Path) -> dict[str, list]:
    """Every number that is no time, and the bytes of every text and weight; by name of the file."""
    found = {}
    for name in ("metrics.jsonl", "eval.jsonl"):
        found[name] = [_exact(json.loads(line)) for line in whole_lines(workdir / name)]
    results = _exact(json.loads((workdir / "results.json").read_text()))
    found["results.json"] = list(results.items())
    # With a fingerprint of every leaf of the state, the optimizer's too.
    metadata = workdir / f"checkpoints/{resume_config.STEPS}/meta/metadata"
    weights = sorted(workdir.glob("*/*.safetensors"))
    for path in (metadata, *weights, *sorted(workdir.glob("trajectories_*.jsonl"))):
        found[str(path.relative_to(workdir))] = path.read_bytes().splitlines(keepends=True)
    return found


def _exact(value):
    """Floats as hex; what depends on the process is left out."""
    if isinstance(value, dict):
        return {k: _exact(v) for k, v in value.items() if k not in _OF_THE_PROCESS}
    if isinstance(value, list):
        return [_exact(v) for v in value]
    return value.hex() if isinstance(value, float) else value
