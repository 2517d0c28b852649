"""Where a run works: in its directory, or in a copy of one that is in object storage."""

import contextlib
import hashlib
import os
import pathlib
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from absl import logging
from etils import epath

from gkdjax.parallel import multihost, shutdown
from gkdjax.train import lock
from gkdjax.train.stopping import StopRequest
from gkdjax.utils import remote
from gkdjax.utils.errors import GkdjaxError, Preempted, UserError


class Places(NamedTuple):
    """The directories of a run."""

    own: pathlib.Path  # of this process, for all but checkpoints
    shared: pathlib.Path  # of all processes of this machine, for a server's answers
    run: pathlib.Path | epath.Path  # what the user calls it, of all processes: for checkpoints
    keep: Callable[[], None] | None  # has `own` outlive the machine; None: it is there already


@contextlib.contextmanager
def open_places(
    workdir: str | os.PathLike, stop: StopRequest, server_answers: bool = False
) -> Iterator[Places]:
    """Gives the directories of a run, which no other run has meanwhile.

    `server_answers`: the run keeps answers of a teacher's server.

    Raises:
      UserError: another run is at work there, or it cannot be read and written.
      StorageUnreachable: object storage stays away.
    """
    run = remote.place(workdir)
    if remote.is_remote(run):
        with _copied(run, stop, server_answers) as places:
            yield places
    else:
        with lock.locked(run), multihost.own_directory(run) as own:
            yield Places(own, run, run, None)


@contextlib.contextmanager
def _copied(run: epath.Path, stop: StopRequest, server_answers: bool) -> Iterator[Places]:
    """The leader's copy lasts, as it has what was not sent yet, and a server's answers."""
    if server_answers and jax.process_count() > 1:
        raise UserError(
            f"--workdir={run}: the answers of a teacher's server lie on the leader's disk, and"
            " several processes do not share it; give --workdir a directory that all of them see"
        )
    own = _directory_of(run)
    with lock.locked(own), contextlib.ExitStack() as held:
        with multihost.fail_together():
            if multihost.leads():
                copy = held.enter_context(_leaders(remote.Copy(run, own), stop))
        with multihost.fail_together():
            if not multihost.leads():
                own = pathlib.Path(held.enter_context(tempfile.TemporaryDirectory()))
                remote.Copy(run, own).fetch()
        keep = copy.send if multihost.leads() else None
        try:
            yield Places(own, own, run, keep)
        except GkdjaxError as error:
            raise type(error)(str(error).replace(str(own), str(run))) from error


def _directory_of(run: epath.Path) -> pathlib.Path:
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    name = hashlib.sha256(str(run).rstrip("/").encode()).hexdigest()[:16]
    own = cache / "gkdjax" / "runs" / name
    if multihost.leads():
        logging.info("%s is worked on in %s, and copied every %g s", run, own, remote.EVERY_S)
    return own


@contextlib.contextmanager
def _leaders(copy: remote.Copy, stop: StopRequest) -> Iterator[remote.Copy]:
    """Fetches the run, and sends what changes; all of it, whichever way the block ends."""
    if copy.is_finished():  # it is shown
        copy.fetch()
        yield copy
        copy.clear()
        return
    if copy.acquire():
        copy.send()
    else:
        copy.fetch()
        copy.keep()
    over = threading.Event()
    sender = threading.Thread(target=_send, args=(copy, over), daemon=True)
    sender.start()

    def end() -> None:
        with stop.deferred():
            over.set()
            sender.join()
            copy.send()
            copy.release()

    try:
        yield copy
    except BaseException:
        try:
            end()
        except GkdjaxError as error:
            logging.error("%s", error)
        raise
    end()
    copy.clear()


def _send(copy: remote.Copy, over: threading.Event) -> None:
    """Sends what changed, again and again; an outage in between is only told."""
    while not over.wait(remote.EVERY_S):
        try:
            if not copy.show_life():
                print("gkdjax: another process took the run over; this one ends", file=sys.stderr)
                shutdown.leave(Preempted.exit_code)
            copy.send()
        except GkdjaxError as error:
            logging.warning("%s", error)
