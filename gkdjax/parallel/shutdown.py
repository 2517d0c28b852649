"""Several processes end together: with one exit code, and without waiting for each other forever.

JAX has each process wait at its end for all others, and notices one that is gone after 100
seconds, by aborting the rest (exit code 134). So a process that fails says so in JAX's store of
keys, and leaves without that wait; a thread in each of the others reads it there.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

_POLL_S = 1.0
# Processes that were asked to stop, or found the same error, end by themselves, perhaps writing.
GRACE_S = 60.0
_LEADER_STAYS_S = GRACE_S + 10.0
_LONGEST_RUN_MS = 2**31 - 1  # 24 days, which is how long one process may be done before another
_before_leaving: list[Callable[[], None]] = []


@contextlib.contextmanager
def together(client: Any, process: int, processes: int) -> Iterator[None]:
    """All processes end inside of this, or all leave with the code of the first that fails.

    Args:
      client: JAX's, of its distributed runtime.
      process: which one this is.
      processes: how many there are.
    """
    over, done = threading.Event(), threading.Event()

    def ends_by_itself() -> bool:
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and not done.is_set() and not over.wait(0.1):
            pass
        return over.is_set()

    def leave_together(code: int) -> None:
        """Process 0 goes last, as it has the store of keys."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"gkdjax/left/{process}", "")
            deadline = time.monotonic() + _LEADER_STAYS_S
            while process == 0 and time.monotonic() < deadline:
                if len(client.key_value_dir_get("gkdjax/left/")) == processes:
                    break
                time.sleep(0.1)
        leave(code)

    def watch() -> None:
        """Leaves when another process has failed and this one does not end by itself."""
        while not over.wait(_POLL_S):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody has failed
                code, text = json.loads(client.key_value_try_get("gkdjax/failed"))
                if not ends_by_itself():
                    print(f"gkdjax: {text}", file=sys.stderr)
                    leave_together(code)

    watcher = threading.Thread(target=watch, name="ending")
    watcher.start()
    try:
        yield
        done.set()  # until all are done another's failure is this one's, too
        client.wait_at_barrier("gkdjax/finished", _LONGEST_RUN_MS)
    except BaseException as error:
        over.set()
        watcher.join()
        code = exit_code(error)
        text = f"process {process} ended with {code}: {error or type(error).__name__}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was the first to fail
            client.key_value_set("gkdjax/failed", json.dumps([code, text]))
        atexit.register(leave_together, code)  # what is raised is printed before
        raise
    over.set()
    watcher.join()


@contextlib.contextmanager
def before_leaving(work: Callable[[], None]) -> Iterator[None]:
    """Has `leave` do some work first, while the block runs."""
    _before_leaving.append(work)
    try:
        yield
    finally:
        _before_leaving.remove(work)


def leave(code: int) -> None:
    """Ends this process at once, without JAX's wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    for work in _before_leaving:  # in a thread, as a file system may be what hangs
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(1.0)
    os._exit(code)


def exit_code(error: BaseException) -> int:
    """The code with which Python ends for it."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return getattr(error, "exit_code", 1)
