"""Measures one case in this process, which should be a fresh one: peak memory is per process."""

import gc
import importlib.metadata
import os
import pathlib
import platform
import time

import jax

from gkdjax.benchmarks.case import Case
from gkdjax.benchmarks.steps import prepare

_STATUS = pathlib.Path("/proc/self/status")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def measure(case: Case) -> dict:
    """Builds, compiles, takes one step to warm up and `case.steps` timed ones.

    Returns:
      JSON: seconds and cpu_seconds (of all threads) of each timed step; losses, mean nats a target,
      of every step; peak_bytes, of the device or, on a CPU, of the process since the step was
      compiled; temp_bytes; and where it ran, `memory` saying which of the two.
    """
    step, state, temp_bytes = prepare(case)
    gc.collect()
    _forget_peak()
    seconds, cpu_seconds, losses = [], [], []
    for _ in range(1 + case.steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        state, sums = jax.block_until_ready(step(state))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        losses.append(float(sums["loss_sum"]) / float(sums["targets"]))
    memory, most = peak_bytes()
    return {
        "seconds": seconds[1:],
        "cpu_seconds": cpu_seconds[1:],
        "losses": losses,
        "peak_bytes": most,
        "temp_bytes": temp_bytes,
        "where": {"memory": memory} | _where(),
    }


def _forget_peak() -> None:
    """Sets the process's peak memory to what it holds now, where Linux lets it (man 5 proc)."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # then building the models counts too, which is less than a step needs


def peak_bytes() -> tuple[str, int]:
    """What it is, and how much: of the device, or on a CPU of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return "peak_bytes_in_use", stats["peak_bytes_in_use"]
    # Not getrusage: on Linux its maximum includes the parent's memory, from before the exec.
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
    return "RSS", int(line.split()[1]) * 1024


def _where() -> dict:
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _cpu_model() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
