"""A real vLLM server for the integration tests, and our own forward pass beside it."""

import contextlib
import dataclasses
import http.client
import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator

from gkdjax.config import Config
from gkdjax.teachers.local import LocalTeacher
from gkdjax.train import models, setup
from gkdjax.train.setup import RunInputs

SCRIPT = pathlib.Path(__file__).parents[1] / "launch" / "start_vllm.sh"
ARGUMENTS = ("--max-model-len", "512")
_START_S = 300.0  # 40 s on two cores that have nothing else to do
_STOP_S = 20.0


class VllmServer:
    """A server of the directory `model` under `name`, at `base`; its processes are one group."""

    def __init__(self, python: str, model: str, name: str, log: pathlib.Path, *arguments: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._health, self.base = f"http://127.0.0.1:{port}/health", f"http://127.0.0.1:{port}/v1"
        self.model, self.name = model, name
        self._command = [SCRIPT, "--cpu", model, name, str(port), *ARGUMENTS, *arguments]
        self._environment = os.environ | {"VLLM_PYTHON": python}
        self._log, self._process = log, None

    def start(self) -> None:
        """Returns when it answers; else an error shows the end of its log."""
        how = {"env": self._environment, "stderr": subprocess.STDOUT, "start_new_session": True}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, **how)
        deadline = time.monotonic() + _START_S
        while not self._answers():
            ended = self._process.poll()
            if ended is not None or time.monotonic() > deadline:
                self.kill()
                what = f"did not answer in {_START_S} s" if ended is None else f"ended with {ended}"
                tail = self._log.read_text(errors="replace")[-6000:]
                raise RuntimeError(f"{self._command} {what}; {self._log} ends with\n{tail}")
            time.sleep(0.5)

    def stop(self) -> None:
        """Asks it to end, and then makes it."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
            self.kill()

    def kill(self) -> None:
        """SIGKILL to all of its processes, at once."""
        with contextlib.suppress(ProcessLookupError):  # all are gone already
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self._health, timeout=5.0) as reply:
                return reply.status == 200
        except (OSError, http.client.HTTPException):
            return False


@contextlib.contextmanager
def connected(
    c: Config, workdir: pathlib.Path, adapter: str = ""
) -> Iterator[tuple[RunInputs, LocalTeacher]]:
    """(a run's rows, whose teacher is at a server; the student as a teacher in this process).

    The latter has the PEFT adapter in `adapter`; a directory `workdir` is for one teacher.
    """
    workdir.mkdir(exist_ok=True)
    with contextlib.ExitStack() as connections:
        rows = setup.read(c, workdir, None, connections)
        # Of a server's config it would be exact, and not the server's K tokens.
        here = dataclasses.replace(c.teacher, adapter=adapter, backend="local-toggle")
        c = dataclasses.replace(c, teacher=here)
        how = rows.lengths, rows.mesh, rows.vocab_size
        in_process = models.LocalTeacherFactory(c, workdir, *how)
        own = models.load(c, rows.sources.student, c.student.dtype, rows.mesh, ())
        yield rows, in_process.config_teacher(rows.sources, own)
