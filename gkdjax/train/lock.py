"""One run at a time works in a directory, on all hosts that share it.

RUN/.gkdjax-lock names its holder: process, host, and since when. The holder also has a `flock` on
it, which the kernel frees when the process is killed, but which many shared file systems keep to
one host, or lack. So the holder touches the file every few seconds. A run on another host that sees
a touch is refused; after a long time without one it takes over, so a preempted machine that comes
back under another name needs nobody. A holder that was only suspended or cut off, and finds its
lock taken when it goes on, ends. Clocks of different hosts are never compared.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import BinaryIO

from absl import logging

from gkdjax.parallel import multihost, shutdown
from gkdjax.report import run_files
from gkdjax.utils import files
from gkdjax.utils.errors import Preempted, UserError

LOCK = ".gkdjax-lock"
_TOUCH_S = 5.0
_SILENT_S = 180.0  # NFS and FUSE may show a touch a minute late
_POLL_S = 0.5


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of the directory of a run that is not finished.

    All processes of a run come here, and the leader holds the lock.

    Raises:
      UserError: another run is at work there.
      NotWritten: the directory cannot be written.
    """
    multihost.wait_for_all()  # CPUs that meet for the first time wait 30 s, and later for long
    with contextlib.ExitStack() as held:
        with multihost.fail_together():
            # A finished run is only shown, and may be read-only.
            if multihost.leads() and run_files.load(workdir / "results.json") is None:
                held.enter_context(_held(workdir / LOCK))
        yield


@contextlib.contextmanager
def _held(path: pathlib.Path) -> Iterator[None]:
    holder = {
        "id": uuid.uuid4().hex,
        "process": os.getpid(),
        "began": _began(os.getpid()),
        "host": socket.gethostname(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds"),
    }
    mine, released = json.dumps(holder | _kernel()).encode(), threading.Event()
    with files.writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _acquired(path, mine)

    def release() -> None:
        with contextlib.suppress(OSError):
            if path.read_bytes() == mine:
                path.unlink()

    toucher = threading.Thread(target=_touch, args=(path, mine, released), daemon=True)
    toucher.start()
    with file, shutdown.before_leaving(release):
        try:
            yield
        finally:
            released.set()
            toucher.join()
            release()


def _touch(path: pathlib.Path, mine: bytes, released: threading.Event) -> None:
    """Shows that the holder lives; ends it if the lock is no longer its own."""
    while not released.wait(_TOUCH_S):
        try:
            if path.read_bytes() == mine:
                os.utime(path)
                continue
        except FileNotFoundError:
            pass
        except OSError:  # of the file system, for the moment
            continue
        print(
            f"gkdjax: {path} was removed, or taken over by another run because this one had shown"
            f" no sign of life for {_SILENT_S:g} s; this one ends",
            file=sys.stderr,
        )
        shutdown.leave(Preempted.exit_code)


def _acquired(path: pathlib.Path, mine: bytes) -> BinaryIO:
    """Makes the lock and returns it open: closed, it loses its flock."""
    while True:
        with contextlib.suppress(FileExistsError):
            file = path.open("xb", buffering=0)
            try:
                _flock(file)
                file.write(mine)
                if path.read_bytes() == mine:
                    return file
            except OSError:
                path.unlink(missing_ok=True)
                file.close()
                raise
            file.close()  # taken over while it was empty
        with contextlib.suppress(FileNotFoundError):  # released in between
            _remove(path, _stale(path))


def _remove(path: pathlib.Path, stale: bytes) -> None:
    aside = path.with_name(f"{LOCK}.{uuid.uuid4().hex}")
    path.rename(aside)  # for one of several that found it stale
    if aside.read_bytes() == stale:
        aside.unlink()
    else:  # another was faster, and this is its own
        aside.rename(path)


def _stale(path: pathlib.Path) -> bytes:
    """Returns the content of a lock whose holder is gone.

    Raises:
      UserError: the holder lives.
    """
    with path.open("r+b") as file:
        content, touched = file.read(), os.fstat(file.fileno()).st_mtime
        flocked = _flock(file)
    holder, here = _parsed(content), _kernel()
    whose = "process {process} on host {host}, since {since}".format_map(holder)
    same_kernel = holder["boot"] == here["boot"] != ""
    gone = flocked and (same_kernel or not content)  # 0.1.0 wrote nothing into it
    alive = flocked is False
    if same_kernel and holder["pids"] == here["pids"] and not gone:
        alive = alive or _began(holder["process"]) == holder["began"]
        gone = not alive
    if not gone and not alive:
        logging.warning(
            "%s is of %s, perhaps another machine: this run takes over if it sees no sign of life"
            " for %g s; if that one is surely gone, remove the file to go on at once",
            *(path, whose, _SILENT_S),
        )
        deadline = time.monotonic() + _SILENT_S
        while not alive and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            with path.open("rb") as file:
                if file.read() != content:
                    return _stale(path)
                before, touched = touched, os.fstat(file.fileno()).st_mtime
            alive = touched != before
    if alive:
        seen = datetime.datetime.fromtimestamp(touched, datetime.UTC).isoformat(" ", "seconds")
        raise UserError(
            f"another process is at work in {path.parent}: {whose}, last seen {seen}. Wait until it"
            f" has ended, or give --workdir another directory; if it is surely gone, remove {path}"
        )
    if content:
        logging.warning("%s is taken over from %s, which is gone", path, whose)
    return content


def _parsed(content: bytes) -> dict:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    unknown = dict.fromkeys(("process", "began", "host", "since", "boot", "pids"), "unknown")
    return unknown | (found if isinstance(found, dict) else {})


def _flock(file: BinaryIO) -> bool | None:
    """Takes the flock -> whether it was free; None where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _kernel() -> dict[str, str]:
    """Names this start of the kernel, and the container's process numbers; "" where unknown."""
    found = {"boot": "", "pids": ""}
    with contextlib.suppress(OSError):
        found["boot"] = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found["pids"] = os.readlink("/proc/self/ns/pid")
    return found


def _began(process: int) -> str | None:
    """When a process of this container began, in ticks of the kernel; None if it has ended."""
    try:
        stat = pathlib.Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
