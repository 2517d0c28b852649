"""The stores of a run that several processes make: one file each, for one host each writes to one.

STORE.sqlite is the leader's, STORE.1.sqlite that of process 1. Before the first question all have
the answers of all, however many processes there were at an earlier start.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterator

import jax

from gkdjax.teachers.server.store.answers import AnswerStore


def of_process(path: str | pathlib.Path, number: int) -> pathlib.Path:
    """The file of a process; the leader, 0, has the store that the config names."""
    path = pathlib.Path(path)
    return path if number == 0 else path.with_name(f"{path.stem}.{number}{path.suffix}")


def gather(path: str | pathlib.Path) -> None:
    """Puts into the leader's store what those of other processes hold.

    Raises:
      UserError: one of them cannot be read, or is damaged.
    """
    for other in _others(pathlib.Path(path)):
        _add(other, pathlib.Path(path))


def spread(path: str | pathlib.Path) -> None:
    """Puts into the store of each other process of this run what the leader's holds.

    Raises:
      UserError: as `gather`.
    """
    for number in range(1, jax.process_count()):
        _add(pathlib.Path(path), of_process(path, number))


def _others(path: pathlib.Path) -> Iterator[pathlib.Path]:
    name = re.compile(rf"{re.escape(path.stem)}\.\d+{re.escape(path.suffix)}")
    return (file for file in sorted(path.parent.glob("*")) if name.fullmatch(file.name))


def _add(source: pathlib.Path, target: pathlib.Path) -> None:
    """Of two answers to one key the target's stays."""
    with (
        contextlib.closing(AnswerStore(source, read_only=True)) as held,
        contextlib.closing(AnswerStore(target)) as store,
    ):
        for teacher in held.teachers():
            store.add_teacher(teacher)
        for one in held.all():
            if store.missing([one.key]):
                store.put(one.fingerprint, [(one.key, one.kind, one.answer)])
