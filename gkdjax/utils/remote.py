"""A run's directory in object storage: gs://BUCKET/RUN.

Object storage has neither appending nor locks. So a run works in a directory of its machine, and
copies files from and to the bucket, each as a whole. Only checkpoints are written there directly,
by Orbax, because every process has a part of them.
"""

import contextlib
import datetime
import fnmatch
import json
import os
import pathlib
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator

from absl import logging
from etils import epath

from gkdjax.utils import files
from gkdjax.utils.errors import GkdjaxError, StorageUnreachable, UserError, one_line

EVERY_S = 30.0  # files that changed are sent so often
_SILENT_S = 4 * EVERY_S  # who has shown no sign of life for so long is gone
_LOCK, _COPY = ".gkdjax-lock", ".gkdjax-copy"
_NOT_SENT = ("checkpoints", ".*", "*.part", "*.sqlite*")
_NOT_FETCHED = ("checkpoints", "merged", "adapter", "tensorboard", _LOCK)
# Faults of this package or of a library, which no later start mends.
_FAULTS = TypeError | AttributeError | LookupError | NameError | AssertionError
# Of tensorstore's errors, which are of the type ValueError.
_STATUS = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED"
    "|UNAUTHENTICATED|PERMISSION_DENIED|NOT_FOUND"
)
_STAYS = ("*.sqlite*", _LOCK)  # on the machine, when everything else is fetched anew


def place(path: str | os.PathLike) -> pathlib.Path | epath.Path:
    """Returns a run's directory as a path: of a file system, or of object storage (gs://).

    Raises:
      UserError: another kind of storage, or no bucket is named.
    """
    scheme, found, rest = os.fspath(path).partition("://")
    if not found:
        return pathlib.Path(path)
    if scheme != "gs":
        raise UserError(f"{path}: a run can be in a directory, or in gs://BUCKET/RUN")
    if not rest.partition("/")[0]:
        raise UserError(f"{path} names no bucket: gs://BUCKET/RUN")
    return epath.Path(path)


def is_remote(path: os.PathLike) -> bool:
    return not isinstance(path, pathlib.Path)


class Copy:
    """A directory of this machine that is copied from and to a remote one.

    All methods raise UserError where the access is refused, and StorageUnreachable for whatever
    may pass.
    """

    def __init__(self, run: epath.Path, own: pathlib.Path):
        """`run` is remote, and `own` its copy."""
        self._run, self._own = run, own
        self._sent: dict[str, tuple[int, int] | None] = {}  # name -> time and size, None: unknown
        self._sending, self._lock = threading.Lock(), b""
        with writing(self._run):
            self._files = _file_system()

    def acquire(self) -> bool:
        """Takes the lock of the run -> whether `own` is the newest copy, which may be newer still.

        Raises:
          UserError: another process works on the run.
        """
        with writing(self._run):
            held, copy = self._read_lock(), self._own / _COPY
            holder = _holder(held)
            newest = copy.exists() and holder["copy"] == copy.read_text()
            # On one host `train.lock` has `own`; another may have a copy of the whole disk.
            if not newest or holder["host"] != socket.gethostname():
                self._wait_until_silent(held)
            if not newest:
                copy.unlink(missing_ok=True)
            try:
                self._write_lock(working=True, mode="overwrite" if held else "create")
            except FileExistsError:  # another one was faster
                return self.acquire()
            if newest:
                self._sent = dict.fromkeys(self._names())
            return newest

    def fetch(self) -> None:
        """Makes `own` a copy of the remote directory, without checkpoints and exports."""
        self.clear()
        with writing(self._run):
            names = self._names()
            if names:
                self._files.get(
                    rpath=[self._url(n) for n in names], lpath=[str(self._own / n) for n in names]
                )
        self._sent = self._found()

    def clear(self) -> None:
        """Empties `own`, but for a server's answers."""
        for path in self._own.iterdir():
            if not _fits(path.name, _STAYS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def is_finished(self) -> bool:
        """Whether the remote directory holds the results of a run."""
        with writing(self._run):
            return self._files.exists(self._url("results.json"))

    def keep(self) -> None:
        """Declares `own` the newest copy: whoever works elsewhere next fetches what it sent."""
        files.write_text(self._own / _COPY, uuid.uuid4().hex)
        with writing(self._run):
            self._write_lock(working=True)

    def send(self) -> None:
        """Sends every file that changed, the oldest first, and removes those that are gone."""
        with self._sending, writing(self._run):
            found = self._found()
            for name in sorted(found, key=found.__getitem__):
                if self._sent.get(name) != found[name]:
                    with contextlib.suppress(FileNotFoundError):  # removed in between
                        self._send_file(name)
                        self._sent[name] = found[name]
            for name in self._sent.keys() - found.keys():
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(self._url(name))
                del self._sent[name]

    def show_life(self) -> bool:
        """Renews the lock -> False if it is not this process's any longer."""
        with writing(self._run):
            if self._read_lock() != self._lock:
                return False
            self._write_lock(working=True)
            return True

    def release(self) -> None:
        """Frees the lock, which still names the newest copy."""
        with writing(self._run):
            if self._read_lock() == self._lock:
                self._write_lock(working=False)

    def _found(self) -> dict[str, tuple[int, int]]:
        """The files that are to be sent."""
        found = {}
        for folder, _, names in os.walk(self._own):
            for path in (pathlib.Path(folder, name) for name in names):
                name = path.relative_to(self._own).as_posix()
                if not _fits(name, _NOT_SENT):
                    with contextlib.suppress(FileNotFoundError):  # removed in between
                        found[name] = path.stat().st_mtime_ns, path.stat().st_size
        return found

    def _names(self) -> list[str]:
        """The remote files that are to be fetched."""
        root = self._url("")
        names = (f"gs://{path}".removeprefix(root) for path in self._files.find(root))
        return [n for n in names if not _fits(n, _NOT_FETCHED) and not n.endswith("/")]

    def _send_file(self, name: str) -> None:
        path = self._own / name
        if path.suffix == ".safetensors":  # large, and never appended to
            self._files.put_file(str(path), self._url(name))
        else:
            self._files.pipe_file(self._url(name), path.read_bytes())

    def _url(self, name: str) -> str:
        return f"{str(self._run).rstrip('/')}/{name}"

    def _read_lock(self) -> bytes:
        try:
            return self._files.cat_file(self._url(_LOCK))
        except FileNotFoundError:
            return b""

    def _write_lock(self, *, working: bool, mode: str = "overwrite") -> None:
        copy = self._own / _COPY
        content = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "seen": datetime.datetime.now(datetime.UTC).isoformat(" "),
            "copy": copy.read_text() if copy.exists() else "",
            "working": working,
        }
        self._lock = json.dumps(content).encode()
        self._files.pipe_file(self._url(_LOCK), self._lock, mode=mode)

    def _wait_until_silent(self, held: bytes) -> None:
        holder = _holder(held)
        if not holder["working"]:
            return
        whose = "process {process} on host {host}, last seen {seen}".format_map(holder)
        url = self._url(_LOCK)
        logging.warning(
            "%s is of %s: this run goes on if it sees no sign of life of that one for %g s; if it"
            " is surely gone, remove the object to go on at once",
            *(url, whose, _SILENT_S),
        )
        deadline = time.monotonic() + _SILENT_S
        while time.monotonic() < deadline:
            time.sleep(min(EVERY_S, _SILENT_S) / 10)
            now = self._read_lock()
            if _holder(now)["working"] and now != held:
                raise UserError(
                    f"another process is at work in {self._run}: {whose}. Wait until it has ended,"
                    " or give --workdir another directory"
                )
            if now != held:
                return


@contextlib.contextmanager
def writing(run: pathlib.Path | epath.Path) -> Iterator[None]:
    """Has what goes wrong in the block name `run`, as `files.writing` has it for a disk.

    Raises:
      UserError: object storage refuses the access.
      StorageUnreachable: what may pass.
      NotWritten: `run` is on a disk.
    """
    if not is_remote(run):
        with files.writing(run):
            yield
        return
    try:
        yield
    except Exception as error:  # of gcsfs, aiohttp, google.auth, tensorstore: nothing in common
        if isinstance(error, GkdjaxError | FileExistsError | _FAULTS) or (
            isinstance(error, ValueError) and not _STATUS.search(str(error))
        ):
            raise
        refused = isinstance(error, FileNotFoundError) or getattr(error, "code", 0) in (401, 403)
        if refused or any(word in str(error) for word in ("Forbidden", "PERMISSION_DENIED")):
            raise UserError(
                f"{run} cannot be used: {type(error).__name__}: {one_line(error)}. Check that the"
                " bucket is there, and that this machine's account may read and write in it"
            ) from error
        raise StorageUnreachable(
            f"{run} cannot be reached: {type(error).__name__}: {one_line(error)}. The same command"
            " goes on, later"
        ) from error


def _holder(lock: bytes) -> dict:
    """Parses a lock; an object that is none of ours counts as held."""
    try:
        found = json.loads(lock)
    except ValueError:
        found = None
    unknown = dict.fromkeys(("process", "host", "seen", "copy"), "unknown")
    return unknown | {"working": bool(lock)} | (found if isinstance(found, dict) else {})


def _file_system():
    try:
        import gcsfs
    except ImportError as error:
        raise UserError(
            "gs:// needs gcsfs, which is not installed: pip install -e '.[gcs]'"
        ) from error
    logging.logging.getLogger("gcsfs").setLevel("CRITICAL")  # its errors are raised, too
    return gcsfs.GCSFileSystem(use_listings_cache=False)


def _fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether the name, or that of a folder in it, is one of these."""
    return any(fnmatch.fnmatch(part, p) for part in name.split("/") for p in patterns)
