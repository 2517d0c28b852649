"""Rounds of measurements, their medians, processes of their own, and memory.

A machine is not equally fast all the time. So each round measures every case once, one after the
other, and ratios are taken within a round.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from gkdjax.utils.files import write_text

GIB = 2**30
Results = dict[Any, list[dict]]  # case -> one dict of numbers a round
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def rounds(cases: Mapping[Any, Callable[[], dict]], count: int, out: str | None = None) -> Results:
    """Calls each case `count` times in turn; `out` names a JSON file, written after each round."""
    results: Results = {case: [] for case in cases}
    for number in range(count):
        for case, measure in cases.items():
            results[case].append(measure())
            print(f"round {number + 1} of {count}: {case}", file=sys.stderr, flush=True)
        if out is not None:
            measured = [{"case": str(case), "rounds": found} for case, found in results.items()]
            write_text(pathlib.Path(out), json.dumps(measured, indent=1) + "\n")
    return results


def timed(program: Callable, times: int = 1) -> dict[str, float]:
    """Seconds of a call and CPU seconds of all threads, each the median of `times` calls."""
    seconds, cpu_seconds = [], []
    for _ in range(times):
        start, cpu_start = time.perf_counter(), time.process_time()
        jax.block_until_ready(program())
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {"seconds": statistics.median(seconds), "cpu_seconds": statistics.median(cpu_seconds)}


def median(found: list[dict], key: str = "seconds", over: list[dict] | None = None) -> float:
    """The median of a case's rounds, or of their ratios to those of the case `over`."""
    if over is None:
        return statistics.median(one[key] for one in found)
    return statistics.median(a[key] / b[key] for a, b in zip(found, over, strict=True))


def in_new_process(module: str, *arguments: str, **environment: str) -> dict:
    """The JSON in the last line that `python -m module arguments` prints.

    Raises:
      RuntimeError: it failed; the end of its stderr is in the message.
    """
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"{module} {arguments} failed:\n{process.stderr[-4000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def status_bytes(field: str, process: int | str = "self") -> int:
    """A size in /proc/PROCESS/status (Linux): VmHWM, RssAnon.

    Not getrusage: its maximum includes the parent's memory, from before the exec.
    """
    lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    line = next(x for x in lines if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Sets the process's peak memory to what it holds now, where Linux lets it (man 5 proc)."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # then building the models counts too, which is less than a step needs


def peak_bytes() -> tuple[str, int]:
    """(name, bytes) of the peak memory: the device's, or on a CPU the process's."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return "peak_bytes_in_use", stats["peak_bytes_in_use"]
    return "RSS", status_bytes("VmHWM")


def where() -> str:
    """The device and the versions of what it runs."""
    device = jax.local_devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        kind = next(names, platform.machine())
    versions = (f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    cores = len(os.sched_getaffinity(0))
    return ", ".join([kind, f"{cores} cores", f"python {platform.python_version()}", *versions])
