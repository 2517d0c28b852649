"""Starts programs, alone or side by side as the processes of a cluster."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import compiling

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
PROBE = [sys.executable, str(pathlib.Path(__file__).with_name("cluster_probe.py"))]
MAIN = [sys.executable, "-m", "gkdjax.main"]
_CONFIG = """\
import os
from gkdjax import config

def get_config():
    c = config.default()
    c.student.model = "/no/such"
    c.data.train = [{"prompt": "a", "response": "b"}]
    c.train.seed = SEED
    return c
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """One CPU device for each process, and this package."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.QUICK, "PYTHONPATH": str(ROOT)}
    return os.environ | flags | more


def config_file(path: pathlib.Path, seed: str = "0") -> pathlib.Path:
    """A config without a model, whose seed is an expression: processes can have different ones."""
    path.write_text(_CONFIG.replace("SEED", seed))
    return path


def executable(file: pathlib.Path, text: str) -> pathlib.Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def started(command: list, env: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A process in a group of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        [str(part) for part in command],
        env=env,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(*commands: list, environments=None) -> list[subprocess.CompletedProcess]:
    """All of the commands at once -> their ends, with the output; none outlives a minute."""
    environments = environments or [environment()] * len(commands)
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(started(command, env))
            for command, env in zip(commands, environments, strict=True)
        ]
        outputs = [process.communicate(timeout=60) for process in running]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(running, outputs, strict=True)
    ]


def call(command: list, env: dict[str, str]) -> subprocess.CompletedProcess:
    return run(command, environments=[env])[0]
