"""Disturbs runs for a while, and compares them with one that nobody disturbs.

    JAX_PLATFORMS=cpu python -m gkdjax.benchmarks.soak --minutes=20 --out=soak

Runs of one config (`soak_job`), half on-policy, with a teacher behind HTTP. The first is left in
peace. The others are killed and continued until the time is over: their trainer by SIGKILL, SIGTERM
and SIGINT, their teacher by SIGKILL and SIGSTOP; answers get lost, cut, late or wrong on their way;
bits of checkpoints are flipped; the disk is full for seconds (RLIMIT_FSIZE: no file may grow), as
that needs no rights. The last one then goes on in peace to its end.

Exit code 1: a loss, a batch or the adapter differs from the first run's, an answer in the store was
bought again, a trainer ended with a code that does not fit, or its memory grows.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from gkdjax.benchmarks import harness, soak_job
from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest
from gkdjax.teachers.server.store.answers import AnswerStore
from gkdjax.teachers.server.store.fingerprint import TeacherIdentity, sample_key, score_key
from gkdjax.types import SamplingParams
from gkdjax.utils.files import read_lines, replacing, write_json
from gkdjax.utils.text import bar, table

ROOT = pathlib.Path(__file__).parents[2]
_CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75, signal.SIGINT: 130}
_POLL_S = 0.05
_HANDLED_S = 3.0  # a process takes signals then; before, Python has not come to the first line
_LONGEST_S = 900.0  # of a life that nothing ends
_FULL_S = 3.0  # for which the disk is full
_MOST_GROWTH = 50e6  # bytes per 1,000 steps
_FEWEST_STEPS = 1000  # of a run by which that is measured
_FAULTS = 0.02  # share of the teacher's answers


@dataclasses.dataclass
class Life:
    """One process of a trainer: what was done to it, and how it ended."""

    run: int
    log: str
    began: float  # seconds since 1970
    done: list[str] = dataclasses.field(default_factory=list)  # to it, in this order
    ended: float = 0.0
    first_step: float | None = None  # seconds until the first line that it wrote
    steps: tuple[int, int] = (0, 0)  # lines of metrics.jsonl before and after
    code: int | None = None
    fits: bool = True  # the code, to what was done


@dataclasses.dataclass
class Run:
    """A directory in which lives follow one another until one ends with 0."""

    number: int
    workdir: pathlib.Path

    @property
    def steps(self) -> int:
        """Whole lines of metrics.jsonl."""
        path = self.workdir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0


class Soak:
    """All processes of a soak; a context manager that leaves none of them behind."""

    def __init__(self, out: pathlib.Path, steps: int, seed: int):
        """Makes `out`, which keeps all runs and logs."""
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        self.out, self.lives, self._draw = out, [], random.Random(seed)
        self.counts = collections.Counter()
        self._seed = seed
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        file = pathlib.Path(soak_job.__file__)
        self._config = f"{file}:http://127.0.0.1:{self._port},{steps}"
        self._environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(out / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._teacher: subprocess.Popen | None = None
        self._trainer: subprocess.Popen | None = None
        self.teacher_log = out / "teacher.jsonl"
        self.first_step_s = 10.0  # of the newest life that came so far

    def __enter__(self) -> "Soak":
        return self

    def __exit__(self, *_) -> None:
        for process in filter(None, (self._trainer, self._teacher)):
            process.kill()
            process.wait()

    def new_run(self, number: int) -> Run:
        return Run(number, self.out / f"run{number}")

    def start_teacher(self, faults: float = 0.0) -> None:
        """Starts it, or starts it anew."""
        self.stop_teacher()
        self._faults = faults
        command = [sys.executable, "-m", "gkdjax.benchmarks.soak_job", f"--port={self._port}"]
        command += [f"--log={self.teacher_log}", f"--faults={faults}"]
        command += [f"--seed={self._seed}-{time.monotonic()}"]
        with (self.out / "teacher.log").open("a") as log:
            how = {"stdout": log, "stderr": log, "env": self._environment}
            self._teacher = subprocess.Popen(command, **how)

    def stop_teacher(self) -> None:
        if self._teacher is not None:
            self._teacher.kill()
            self._teacher.wait()

    def live(self, run: Run, disturb: Callable | None = None, seen: Callable | None = None) -> Life:
        """Starts or continues a run -> its process, when it has ended.

        Both are called now and then: `disturb`, see `disturbances`, with the life, its process, its
        run and the seconds since it began; `seen` with the process's id and the run.
        """
        log = self.out / f"life{len(self.lives)}.log"
        life = Life(run.number, str(log), time.time(), steps=(run.steps, run.steps))
        self.lives.append(life)
        command = [sys.executable, "-m", "gkdjax.main", f"--workdir={run.workdir}"]
        began, inode = time.monotonic(), _inode(run.workdir / "metrics.jsonl")
        with log.open("w") as file:
            how = {"stdout": file, "stderr": file, "env": self._environment}
            trainer = subprocess.Popen([*command, f"--config={self._config}"], **how)
        self._trainer = trainer
        opened = None
        while trainer.poll() is None:
            time.sleep(_POLL_S)
            seconds = time.monotonic() - began
            if life.first_step is None and _inode(run.workdir / "metrics.jsonl") != inode:
                opened = run.steps if opened is None else min(opened, run.steps)
                if run.steps > opened:
                    life.first_step = self.first_step_s = seconds
            if seen is not None:
                seen(trainer.pid, run)
            if disturb is not None:
                disturb(life, trainer, run, seconds)
            if seconds > _LONGEST_S and "too long" not in life.done:
                life.done.append("too long")
                trainer.send_signal(signal.SIGABRT)  # the stacks of all threads are in the log
        life.ended, life.code = time.time(), trainer.returncode
        life.steps = life.steps[0], run.steps
        fitting = {0} | {_CODES[s] for s in _CODES if s.name in life.done}
        if disturb is not None:
            fitting |= {4} | ({2, 75} if "full disk" in life.done else set())
        *_, last = ["", *log.read_text(errors="replace").splitlines()]
        if last.startswith("gkdjax: "):  # it had ended, and Python took no more signals
            fitting |= {-number for number in _CODES if number.name in life.done}
        life.fits = life.code in fitting
        return life

    def disturbances(self, run: Run) -> Callable:
        """Draws what is done to a life, around the time of a first step -> does it, for `live`."""
        draw, first = self._draw, self.first_step_s
        if draw.random() < 0.4 and (flipped := _flip_a_bit(run.workdir, draw)):
            self.counts["bits flipped in a checkpoint"] += 1
            with (self.out / "flipped.log").open("a") as log:
                print(len(self.lives), flipped, file=log)
        early = draw.random() < 0.3
        at = draw.uniform(0.0, first) if early else draw.uniform(first, 1.5 * first + 15.0)
        end = draw.choice([*_CODES])
        if end != signal.SIGKILL:
            at = max(at, _HANDLED_S)
        events = [(at, self._end(end))] if draw.random() < 0.9 else []
        if draw.random() < 0.6:
            length = draw.choice((0.5, 3.0, 3.0, 6.0, 1.5 * soak_job.DEADLINE_S)) * draw.random()
            begin = draw.uniform(0.0, at)
            if draw.random() < 0.5:
                events += [(begin, self._kill_teacher), (begin + length, self._teacher_is_back)]
            else:
                events += [(begin, self._stop_teacher), (begin + length, self._continue_teacher)]
        if draw.random() < 0.25:
            begin = draw.uniform(_HANDLED_S, max(at, first + 5.0))
            events += [(begin, self._fill_disk), (begin + _FULL_S, self._empty_disk)]
        events.sort(key=lambda event: event[0])

        def disturb(life: Life, trainer: subprocess.Popen, run: Run, seconds: float) -> None:
            while events and events[0][0] <= seconds:
                events.pop(0)[1](life, trainer, run)

        return disturb

    def mend(self) -> None:
        """Undoes what the disturbances of a life may have left."""
        if self._teacher.poll() is not None:
            self.start_teacher(self._faults)
        self._teacher.send_signal(signal.SIGCONT)

    def _end(self, number: signal.Signals):
        def end(life: Life, trainer: subprocess.Popen, run: Run) -> None:
            trainer.send_signal(number)
            life.done.append(number.name)
            self.counts[f"{number.name} to the trainer"] += 1

        return end

    def _kill_teacher(self, life: Life, trainer: subprocess.Popen, run: Run) -> None:
        self.stop_teacher()
        life.done.append("teacher killed")
        self.counts["SIGKILL to the teacher"] += 1

    def _teacher_is_back(self, life: Life, trainer: subprocess.Popen, run: Run) -> None:
        self.start_teacher(self._faults)

    def _stop_teacher(self, life: Life, trainer: subprocess.Popen, run: Run) -> None:
        self._teacher.send_signal(signal.SIGSTOP)
        life.done.append("teacher stopped")
        self.counts["SIGSTOP to the teacher"] += 1

    def _continue_teacher(self, life: Life, trainer: subprocess.Popen, run: Run) -> None:
        self._teacher.send_signal(signal.SIGCONT)

    def _fill_disk(self, life: Life, trainer: subprocess.Popen, run: Run) -> None:
        """No file grows beyond the size that the largest one has, or a little more."""
        files = [pathlib.Path(life.log), *run.workdir.rglob("*")]
        sizes = [size for path in files if (size := _size(path)) is not None]
        limit = int(self._draw.choice((0.1, 1.0, 1.01)) * max(sizes))
        limit = max(limit, _size(pathlib.Path(life.log)) + 10_000)  # its last words can be said
        self._limit(trainer, limit)
        life.done.append("full disk")
        self.counts["full disk"] += 1

    def _empty_disk(self, life: Life, trainer: subprocess.Popen, run: Run) -> None:
        self._limit(trainer, resource.RLIM_INFINITY)

    def _limit(self, trainer: subprocess.Popen, limit: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def _size(path: pathlib.Path) -> int | None:
    with contextlib.suppress(OSError):
        return path.stat().st_size if path.is_file() else None


def _inode(path: pathlib.Path) -> int | None:
    """A run that goes on replaces the file before it adds to it."""
    with contextlib.suppress(OSError):
        return path.stat().st_ino


def _flip_a_bit(workdir: pathlib.Path, draw: random.Random) -> str:
    """Damages the newest checkpoint, if there is another one -> which file and bit; "" if none."""
    saved = [p for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()]
    if len(saved) < 2:
        return ""
    newest = max(saved, key=lambda path: int(path.name))
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    path = draw.choice(files)
    data = bytearray(path.read_bytes())
    place, bit = draw.randrange(len(data)), draw.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"{path}, byte {place}, bit {bit}"


def outcome(workdir: pathlib.Path) -> dict[str, list]:
    """Reads what has to be equal to the bit."""
    lines = read_lines(workdir / "metrics.jsonl")
    found = {name: [line[name] for line in lines] for name in ("step", "batch_crc32")}
    found["loss"] = [line["loss"].hex() for line in lines]
    files = sorted((workdir / "adapter").glob("*"))
    return found | {"adapter": [(path.name, path.read_bytes()) for path in files]}


def differences(wanted: dict[str, list], got: dict[str, list]) -> dict[str, int]:
    """Name -> how many items differ."""
    found = {}
    for name, items in wanted.items():
        longer = max(len(items), len(got[name]))
        same = sum(a == b for a, b in zip(items, got[name], strict=False))
        found[name] = longer - same
    return found


def bought_twice(run: Run, lives: list[Life], rows: list[dict]) -> collections.Counter:
    """Counts a run's answers: taken, stored, and those that were taken again.

    "twice": it was in the store, or its first trainer had to put it there. "lost": that one could
    not, killed by SIGKILL, on a full disk, or ended with 4, as the server was gone before its
    weights could be looked at again, after an outage.
    """
    own = [life for life in lives if life.run == run.number]
    taken = collections.defaultdict(list)
    for row in rows:
        if own[0].began <= row["asked"] <= own[-1].ended:
            taken[row["row"]].append(row)
    with AnswerStore(run.workdir / "answers.sqlite", read_only=True) as store:
        (known,) = store.teachers()
        created = {stored.key: stored.created for stored in store.all()}
    found = collections.Counter(taken=sum(map(len, taken.values())), stored=len(created))
    for text, times in taken.items():
        # The preflight's requests are in no store.
        keys = created.keys() & _keys(known, json.loads(text)) if len(times) > 1 else ()
        for key, (first, again) in itertools.product(keys, itertools.pairwise(times)):
            by = next(life for life in reversed(own) if life.began <= first["asked"])
            was_stored = created[key] + 1.0 < again["asked"]  # in whole seconds
            could_not = by.code in (-signal.SIGKILL, 4) or "full disk" in by.done
            lost = could_not and by.ended < again["asked"] and not was_stored
            found["lost" if lost else "twice"] += 1
    return found


def _keys(known: TeacherIdentity, row: dict) -> set[str]:
    """Makes the keys of all requests for which a row may have been sent.

    The positions asked of it are not sent.
    """
    ids = np.asarray(row["prompt"], np.int32)
    if "prompt_logprobs" not in row:
        sampling = SamplingParams(row["max_tokens"], row["temperature"], row["top_p"])
        stops = tuple(row["stop_token_ids"])
        request = SampleRequest("", ids, (), sampling, row["seed"], stops, row["logprobs"])
        return {sample_key(known, request, by_messages=False)}
    last, K = len(ids) - 1, row["prompt_logprobs"]
    firsts = range(max(last - soak_job.MOST_TOKENS - 2, 0), last)
    return {score_key(known, ScoreRequest("", ids, np.arange(i, last), K)) for i in firsts}


class Memory:
    """The memory of a trainer, as its steps go by."""

    def __init__(self):
        self.points: list[tuple[int, int]] = []  # (steps, bytes)

    def __call__(self, pid: int, run: Run) -> None:
        steps = run.steps
        if steps and (not self.points or steps > self.points[-1][0]):
            with contextlib.suppress(OSError, StopIteration):  # it has just ended
                self.points.append((steps, harness.status_bytes("VmRSS", pid)))

    def growth(self) -> float | None:
        """Bytes per 1,000 steps: the slope of least squares over the second half.

        None: a short run, in which memory is still being taken for the first time.
        """
        if self.points[-1][0] < _FEWEST_STEPS:
            return None
        steps, sizes = np.asarray(self.points[len(self.points) // 2 :], float).T
        return 1000.0 * float(np.polyfit(steps, sizes, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser("soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="Of disturbances.")
    parser.add_argument("--steps", type=int, help="Of a run; default 60 a minute, at least 60.")
    parser.add_argument("--seed", type=int, default=0, help="Of what is done, and when.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("soak"), help="Emptied.")
    a = parser.parse_args()
    # A shell's background jobs ignore it, and so would the trainers.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    steps = a.steps or max(60, round(60 * a.minutes))
    with Soak(a.out.absolute(), steps, a.seed) as soak:
        found, failures = judge(soak, *soak_runs(soak, 60.0 * a.minutes))
    found = {"minutes": a.minutes, "steps": steps, "seed": a.seed, **found}
    lives = [dataclasses.asdict(life) for life in soak.lives]
    write_json(a.out / "results.json", found | {"failures": failures, "lives": lives})
    _draw(soak.lives, steps, a.out / "soak.png")
    rows = [[name, f"{number:,}"] for name, number in found.items()]
    print(table(["in all", ""], rows, widest=60))
    print(harness.where(), *failures, sep="\nFAILED: ")
    sys.exit(bool(failures))


def soak_runs(soak: Soak, seconds: float) -> tuple[list[Run], Memory]:
    """Makes the first run in peace, and others for so long -> all of them."""
    memory, runs = Memory(), [soak.new_run(0)]
    soak.start_teacher()
    soak.live(runs[0], seen=memory)
    soak.start_teacher(_FAULTS)
    began, code = time.monotonic(), 0
    with bar(round(seconds), "soak") as shown:
        while (passed := time.monotonic() - began) < seconds:
            shown.update(round(passed) - shown.n)
            if code == 0:
                runs.append(soak.new_run(len(runs)))
            code = soak.live(runs[-1], soak.disturbances(runs[-1])).code
            soak.mend()
            shown.set_postfix(run=runs[-1].number, step=runs[-1].steps, code=code)
    soak.start_teacher()
    if code != 0:
        soak.live(runs[-1])
    return runs, memory


def judge(soak: Soak, runs: list[Run], memory: Memory) -> tuple[dict[str, int], list[str]]:
    """-> (what was done and seen, by name, what should not have been)."""
    log = read_lines(soak.teacher_log)
    rows = [line for line in log if "row" in line]
    faults = collections.Counter(line["fault"] for line in log if "fault" in line)
    codes = collections.Counter(life.code for life in soak.lives)
    found = {"runs": len(runs), "trainers": len(soak.lives)} | soak.counts
    found |= {f"answers with the fault {name}": faults[name] for name in sorted(faults)}
    found |= {f"trainers that ended with {code}": codes[code] for code in sorted(codes)}
    found["resumed past step 0"] = sum(life.steps[0] > 0 for life in soak.lives[1:])
    failures = [f"{life.log}: ended with {life.code}" for life in soak.lives if not life.fits]
    ended = [run for run in runs if (run.workdir / "results.json").exists()]
    failures += [f"{run.workdir}: did not end" for run in runs if run not in ended]
    if runs[0] not in ended:
        return found, failures
    wanted, total = outcome(runs[0].workdir), collections.Counter()
    for run in ended:
        unequal = differences(wanted, outcome(run.workdir))
        total.update(unequal)
        failures += [f"{run.workdir}: {n} of {k} differ" for k, n in unequal.items() if n]
        answers = bought_twice(run, soak.lives, rows)
        total.update({f"answers {name}": number for name, number in answers.items()})
        if answers["twice"]:
            failures.append(f"{run.workdir}: {answers['twice']} answers were bought twice")
    names = {f"{name} that differ": number for name, number in total.items() if name in wanted}
    names |= {name: number for name, number in total.items() if name not in wanted}
    found |= names
    if (growth := memory.growth()) is not None:
        found["kB per 1,000 steps that a trainer grows by"] = round(growth / 1e3)
        if growth > _MOST_GROWTH:
            failures.append(f"a trainer grows by {growth / 1e6:.0f} MB per 1,000 steps")
    return found, failures


def _draw(lives: list[Life], steps: int, path: pathlib.Path) -> None:
    """The steps of all runs over time, with a mark where a life ended."""
    figure = Figure((10, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="minutes", ylabel="steps", ylim=(0, 1.05 * steps))
    for life in lives:
        times = [(t - lives[0].began) / 60 for t in (life.began, life.ended)]
        axes.plot(times, life.steps, color="#1b4f72" if life.fits else "#c25a00")
        axes.annotate(str(life.code), (times[1], life.steps[1]), fontsize=7)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)


if __name__ == "__main__":
    main()
