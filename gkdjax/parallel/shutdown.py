"""Several processes end together: with one exit code, and without waiting for each other forever.

JAX has each process wait at its end for all others, and notices one that is gone after 100
seconds, by aborting the rest (exit code 134). So a process that fails tells the others through
JAX's store of keys, and leaves without that wait; a thread in each of the others reads it there.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

_POLL_S = 1.0
# Processes that were told to stop, or found the same error, end by themselves; they may be writing.
GRACE_S = 60.0
_LEADER_STAYS_S = GRACE_S + 10.0
_LONGEST_RUN_MS = 2**31 - 1  # 24 days, which is how long one process may be done before another


@contextlib.contextmanager
def together(client: Any, process: int, processes: int) -> Iterator[None]:
    """All processes end inside of this, or all leave with the code of the first that fails.

    Args:
      client: JAX's, of its distributed runtime.
      process: which one this is.
      processes: how many there are.
    """
    run = _Processes(client, process, processes)
    watch = threading.Thread(target=run.watch, name="ending")
    watch.start()
    try:
        yield
        run.finished()
    except BaseException as error:
        run.stop(watch)
        run.tell(error)
        atexit.register(run.leave, exit_code(error))  # what is raised is printed before
        raise
    run.stop(watch)


def leave(code: int) -> None:
    """Ends this process at once, without JAX's wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Processes:
    """What the processes of a run know of each other's ends."""

    def __init__(self, client: Any, process: int, processes: int):
        self._client, self._process, self._processes = client, process, processes
        self._over, self._finished = threading.Event(), threading.Event()

    def watch(self) -> None:
        """Leaves when another process has failed and this one does not end by itself."""
        while not self._over.wait(_POLL_S):
            told = self._told()
            if told is not None and not self._ends_by_itself():
                code, text = told
                print(f"gkdjax: {text}", file=sys.stderr)
                self.leave(code)

    def stop(self, watch: threading.Thread) -> None:
        self._over.set()
        watch.join()

    def finished(self) -> None:
        """Returns when all are; until then another's failure is this one's, too."""
        self._finished.set()
        self._client.wait_at_barrier("gkdjax/finished", _LONGEST_RUN_MS)

    def tell(self, error: BaseException) -> None:
        """The first to fail is the one that counts."""
        code = exit_code(error)
        text = f"process {self._process} ended with {code}: {error or type(error).__name__}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # it is told already
            self._client.key_value_set("gkdjax/failed", json.dumps([code, text]))

    def leave(self, code: int) -> None:
        """As `leave`; process 0 goes last, as all that is told is kept there."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"gkdjax/left/{self._process}", "")
            deadline = time.monotonic() + _LEADER_STAYS_S
            while self._process == 0 and time.monotonic() < deadline:
                if len(self._client.key_value_dir_get("gkdjax/left/")) == self._processes:
                    break
                time.sleep(0.1)
        leave(code)

    def _told(self) -> tuple[int, str] | None:
        try:
            code, text = json.loads(self._client.key_value_try_get("gkdjax/failed"))
        except jax.errors.JaxRuntimeError:  # nothing is told
            return None
        return code, text

    def _ends_by_itself(self) -> bool:
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and not self._finished.is_set():
            if self._over.wait(0.1):
                return True
        return self._over.is_set()


def exit_code(error: BaseException) -> int:
    """With which Python ends for it."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return getattr(error, "exit_code", 1)
