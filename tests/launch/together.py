"""Starts programs side by side, as the processes of a cluster."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys

import compiling

ROOT = pathlib.Path(__file__).parents[2]
PROBE = [sys.executable, str(pathlib.Path(__file__).with_name("cluster_probe.py"))]
MAIN = [sys.executable, "-m", "gkdjax.main"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """One CPU device for each process, and this package."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.QUICK, "PYTHONPATH": str(ROOT)}
    return os.environ | flags | more


def run(*commands: list[str], environments=None) -> list[subprocess.CompletedProcess]:
    """All of the commands at once -> how each ended, with its output; none outlives a minute."""
    environments = environments or [environment()] * len(commands)
    with contextlib.ExitStack() as started:
        running = []
        for command, env in zip(commands, environments, strict=True):
            process = subprocess.Popen(
                command,
                env=env,
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            started.enter_context(process)
            started.callback(process.kill)
            running.append(process)
        ended = []
        for process in running:
            output = process.communicate(timeout=60)
            ended.append(subprocess.CompletedProcess(process.args, process.returncode, *output))
        return ended
