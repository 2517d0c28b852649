"""Several processes that make one run: each runs the same program, on the same data.

They differ in three things: which rows they ask a server about, whose files are those of the run
(process 0's, the leader's), and which devices are theirs. All of them take the same way through the
program, and meet wherever they have to exchange something. In a single process everything here is
the plain thing.
"""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

# JAX has no public way to its store of keys. Orbax reaches for the same.
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gkdjax.utils import errors
from gkdjax.utils.errors import GkdjaxError, NotWritten, UserError

Result = TypeVar("Result")

# Large, made anew by each process at need, or read through Orbax, which knows of processes.
_NOT_COPIED = ("checkpoints", "merged", "adapter", "tensorboard", "*.sqlite*", "*.part")
_NOT_COPIED += (".processes-*",)
_MEET_S = 0.1
_SEEN_WITHIN_S = 60  # so late may NFS show a new file, as it is mounted by default


def leads() -> bool:
    """Whether this process writes the files of the run."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("wait_for_all")


def any_of_all(flag: bool) -> bool:
    """Whether any process says so."""
    return any(exchange(flag))


def exchange(value: Any) -> list:
    """The values of all processes, in their order: anything that JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray([own.size]))[:, 0]
    padded = np.pad(own, (0, sizes.max() - own.size))
    every = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Work that may fail in one process and not in another.

    Raises:
      GkdjaxError: what it raises; in a process where it went well, the same as in the first where
        it did not, so that all end alike and none waits for another.
    """
    failed = None
    try:
        yield
    except GkdjaxError as error:
        failed = error
    found = exchange(None if failed is None else [type(failed).__name__, str(failed)])
    if failed is not None:
        raise failed
    for process, error in enumerate(found):
        if error is not None:
            raise getattr(errors, error[0])(f"process {process}: {error[1]}")


def on_leader(work: Callable[[], Result]) -> Result | None:
    """The leader works and the others wait for it, as `fail_together` -> its result; else None."""
    with fail_together():
        return work() if leads() else None


def split_over_processes(
    work: Callable[[list[int]], list[Result]], count: int, encode, decode
) -> list:
    """The results of `count` items, shared out: process p of P works on p, p + P, p + 2P, ...

    `work` takes numbers of items; `encode` makes JSON of a result, and `decode` the result again.

    Raises:
      GkdjaxError: as `fail_together`.
    """
    processes = jax.process_count()
    if processes == 1:
        return work(list(range(count)))
    own = list(range(jax.process_index(), count, processes))
    with fail_together():
        found = work(own) if own else []
    parts = exchange([encode(each) for each in found])
    return [decode(parts[i % processes][i // processes]) for i in range(count)]


def rows_from(process_B: np.ndarray, tree: Any) -> Any:
    """Leaves [B,...] with each row from process `process_B`; NumPy, of the same shapes in all."""
    row_B = np.arange(len(process_B))
    return jax.tree.map(lambda x: x[process_B, row_B], multihost_utils.process_allgather(tree))


@contextlib.contextmanager
def own_directory(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """The run's directory for the leader, and for every other process a copy of its own.

    All of them read and write their files as if they were alone. What is large stays in the run's
    directory; UserError if it cannot be made, or not all processes see it.
    """
    if jax.process_count() == 1:
        yield workdir
        return
    _require_shared(workdir)
    with contextlib.ExitStack() as held:
        with fail_together():  # nothing changes while the others copy
            own = workdir if leads() else held.enter_context(_copied(workdir))
        yield own


@contextlib.contextmanager
def _copied(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    with contextlib.ExitStack() as held:
        try:
            parent = held.enter_context(tempfile.TemporaryDirectory(prefix="gkdjax-process-"))
            own = pathlib.Path(parent, "run")
            shutil.copytree(workdir, own, ignore=shutil.ignore_patterns(*_NOT_COPIED))
        except OSError as error:
            raise NotWritten(
                f"{workdir} cannot be copied for this process: {errors.one_line(error)}. Make room"
                " there, or set TMPDIR"
            ) from None
        yield own


@contextlib.contextmanager
def quiet_unless_leading() -> Iterator[None]:
    """What is printed is printed once."""
    if leads():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _require_shared(workdir: pathlib.Path) -> None:
    token = workdir / f".processes-{time.time_ns()}"

    def write() -> str:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as error:
            raise UserError(f"--workdir={workdir} cannot be made: {error}") from None
        return token.name

    token = workdir / exchange(on_leader(write))[0]
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [process for process, seen in enumerate(exchange(token.exists())) if not seen]
    if leads():
        token.unlink()
    if blind:
        raise UserError(
            f"--workdir={workdir}: processes {blind} do not see there what process 0 writes; it has"
            " to lie on a file system that all processes share, as their checkpoints do"
        )


class Barrier:
    """Where threads of all processes meet; if one of them has given up, the others do, too."""

    def __init__(self):
        self._client, self._name = distributed.global_state.client, "gkdjax/gave_up/0"

    def begin(self, number: int) -> None:
        """Begins the `number`-th thing that may be given up: by all processes, before they meet."""
        self._name = f"gkdjax/gave_up/{number}"

    def give_up(self, why: str) -> None:
        if self._client is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one has
                self._client.key_value_set(self._name, f"process {jax.process_index()}: {why}")

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Returns when all have come.

        Raises:
          NotWritten: one has given up.
          TimeoutError: not all came in time.
        """
        if self._client is None:
            return
        here, deadline = f"gkdjax/met/{key}/", time.monotonic() + timeout_ms / 1000
        self._client.key_value_set(f"{here}{jax.process_index()}", "", allow_overwrite=True)
        while len(self._client.key_value_dir_get(here)) < jax.process_count():
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody has
                raise NotWritten(self._client.key_value_try_get(self._name))
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all processes came to {key}")
            time.sleep(_MEET_S)


class Flags:
    """Whether any process says so: all know it at the same step.

    The flags are summed on the devices behind a step, and read when the next one was dispatched: no
    device waits for them. So several processes know it one step later than a single one.
    """

    def __init__(self, mesh: Mesh):
        self._mesh, self._pending = mesh, None

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Called once a step by every process, with its own flags."""
        if jax.process_count() == 1:
            return flags
        cut = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        all_FD = jax.make_array_from_callback(
            (self._mesh.size, len(flags)), cut, lambda _: np.asarray([flags], np.int32)
        )
        before, self._pending = self._pending, _sum(all_FD)
        return (False,) * len(flags) if before is None else tuple(np.asarray(before) > 0)


_sum = jax.jit(functools.partial(jnp.sum, axis=0))
