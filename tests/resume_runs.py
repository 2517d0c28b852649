"""Runs that are killed and continued, as a user would: what to wait for, what must be equal.

All processes share one persistent compilation cache, so that a restart does not compile anew. The
uninterrupted run comes first: that it is equal shows, too, that a cached program gives the same
bits as one that was just compiled.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import factories
import resume_config

ROOT = pathlib.Path(__file__).parents[1]
# What one can wait for, in the order of a run; told from its files.
STAGES = ("writing text", "nothing saved", "steps", "saving", "evaluating", "exporting")
_CACHE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
_OF_THE_PROCESS = {"tokens_per_second", "compilations", "seconds"}


def make_models(directory: pathlib.Path) -> None:
    """The models that `resume_config` names."""
    factories.model_dir(directory / "student")
    factories.model_dir(directory / "teacher", seed=1, hidden_size=32)


@dataclasses.dataclass(frozen=True)
class Moment:
    """When to kill: so many seconds after a stage was reached, or after the start.

    Attributes:
      stage: one of `STAGES`, or None: the start.
      delay: seconds.
      steps: the stage does not count before so many steps are in metrics.jsonl.
    """

    stage: str | None
    delay: float
    steps: int = 0


@dataclasses.dataclass(frozen=True)
class Kill:
    """What a kill hit, and how the next attempt went on."""

    moment: Moment
    hit: str  # the stage that the files show
    saved: int  # newest whole checkpoint, 0 without any
    lines: int  # steps in metrics.jsonl
    resumed_at: int | None  # steps whose lines the next attempt kept; None: it had not begun


class KilledRun:
    """One run in `workdir`, attempt by attempt."""

    def __init__(self, setting: str, base: pathlib.Path, workdir: pathlib.Path, devices: int = 1):
        """`base` holds "models", as `make_models` makes them, and a cache for each setting."""
        self._workdir, self._log = workdir, workdir.with_name(workdir.name + ".log")
        self._command = [
            *(sys.executable, "-m", "gkdjax.main", f"--workdir={workdir}"),
            f"--config={pathlib.Path(__file__).with_name('resume_config.py')}"
            f":{setting},{base / 'models'}",
        ]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(base / "cache" / setting), **_CACHE}
        flags = f"--xla_force_host_platform_device_count={devices}"
        self._environment = {**os.environ, **cache, "XLA_FLAGS": flags}

    def finish(self) -> None:
        """Runs, or continues, to the end."""
        process = self._start()
        try:
            code = process.wait(timeout=600)
        finally:
            process.kill()
        assert code == 0, self._log.read_text()[-5000:]

    def kill_at(self, moment: Moment) -> str | None:
        """Runs until `moment` -> the stage that was hit; None if the run was over before it."""
        watch = Watch(self._workdir)
        process = self._start()
        began = time.monotonic()
        try:
            while process.poll() is None and not watch.reached(moment):
                time.sleep(0.005)
                assert time.monotonic() - began < 600, f"{moment} did not come"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=moment.delay)
        finally:
            process.kill()  # SIGKILL, if it still runs
        code = process.wait()
        assert code in (0, -signal.SIGKILL), self._log.read_text()[-5000:]
        return None if code == 0 else watch.stage()

    def kill_all(self, moments) -> list[Kill]:
        """Kills at each of the moments in turn, then runs to the end; ends early if the run does.

        What has been kept is checked on the way: an attempt goes on from the newest checkpoint, no
        earlier and no later.
        """
        kills: list[Kill] = []
        for moment in moments:
            hit = self._checked(kills, lambda moment=moment: self.kill_at(moment))
            if hit in (None, "finished"):
                return kills
            kills.append(Kill(moment, hit, saved(self._workdir), len(self._lines()), None))
        self._checked(kills, self.finish)
        return kills

    def _checked(self, kills: list[Kill], attempt):
        watch, before = Watch(self._workdir), self._lines()
        result = attempt()
        if kills and watch.trains():
            kept = common_start(before, self._lines())
            kills[-1] = dataclasses.replace(kills[-1], resumed_at=kept)
            # Every line has a time in it: a step that is made again does not give the same one.
            assert kept == kills[-1].saved, kills
            assert not list(self._workdir.glob("checkpoints/*.damaged")), kills
        return result

    def _lines(self) -> list[str]:
        return whole_lines(self._workdir / "metrics.jsonl")

    def _start(self) -> subprocess.Popen:
        with self._log.open("a") as log:
            return subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd=ROOT, env=self._environment
            )


class Watch:
    """The stage of an attempt, told from its files and from what they were before it."""

    def __init__(self, workdir: pathlib.Path):
        self._workdir = workdir
        self._before, self._left = self._opened(), self._begun()

    def trains(self) -> bool:
        """Whether this attempt has restored its state: it then opens metrics.jsonl anew."""
        return self._opened() != self._before

    def reached(self, moment: Moment) -> bool:
        if moment.stage is None:
            return True
        return moment.stage == self.stage() and moment.steps <= self._steps()

    def stage(self) -> str:
        """One of `STAGES`, "starting" or "finished"."""
        if (self._workdir / "results.json").exists():
            return "finished"
        if not self.trains():
            texts = len(whole_lines(self._workdir / "trajectories_train.jsonl"))
            all_texts = resume_config.PROMPTS * resume_config.PER_PROMPT
            return "writing text" if 0 < texts < all_texts else "starting"
        if self._begun() - self._left:
            return "saving"
        if not saved(self._workdir):
            return "nothing saved"
        steps = self._steps()
        last = steps == resume_config.STEPS
        if last or steps % resume_config.EVAL_EVERY == 0:
            found = [json.loads(x)["step"] for x in whole_lines(self._workdir / "eval.jsonl")]
            if steps not in found:
                return "evaluating"
        return "exporting" if last else "steps"

    def _steps(self) -> int:
        return len(whole_lines(self._workdir / "metrics.jsonl"))

    def _begun(self) -> set[tuple[str, int]]:
        """Saves under way; what a killed one left behind stays until its step is saved again."""
        found = set()
        for path in self._workdir.glob("checkpoints/*.orbax-checkpoint-tmp"):
            with contextlib.suppress(FileNotFoundError):  # it has just got its name
                found.add((path.name, path.stat().st_ctime_ns))
        return found

    def _opened(self) -> int | None:
        """The file's inode: a resumed run replaces the file before it goes on."""
        path = self._workdir / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None


def saved(workdir: pathlib.Path) -> int:
    """The newest checkpoint that is whole; 0 if there is none."""
    names = [path.name for path in workdir.glob("checkpoints/*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def whole_lines(path: pathlib.Path) -> list[str]:
    """Without one that is being written; [] if there is no file."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def common_start(one: list, other: list) -> int:
    """How many items are the same from the first on."""
    same = [a == b for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


def differences(whole: pathlib.Path, killed: pathlib.Path) -> list[str]:
    """What is not equal to the bit in two finished runs, each with its first place; [] is good."""
    wanted, got = outcome(whole), outcome(killed)
    if wanted.keys() != got.keys():
        return [f"one run alone has {sorted(wanted.keys() ^ got.keys())}"]
    told = []
    for name, items in wanted.items():
        place = common_start(items, got[name])
        if items != got[name]:
            both = (str(x[place : place + 1])[:300] for x in (items, got[name]))
            told.append(f"{name}, item {place}: " + " and ".join(both))
    return told


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
