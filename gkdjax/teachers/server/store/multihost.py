"""The stores of a run of several processes: one file each, as SQLite is for one machine.

STORE.sqlite is the leader's, STORE.1.sqlite that of process 1. Before the first request each file
has all answers, also those of an earlier start with more processes.
"""

import pathlib
import re

import jax

from gkdjax.teachers.server.store.answers import AnswerStore


def of_process(path: str | pathlib.Path, number: int) -> pathlib.Path:
    """The file of a process; the leader, 0, has the store that the config names."""
    path = pathlib.Path(path)
    return path if number == 0 else path.with_name(f"{path.stem}.{number}{path.suffix}")


def gather(path: str | pathlib.Path) -> None:
    """Copies the answers of all other processes into the leader's store."""
    path = pathlib.Path(path)
    name = re.compile(rf"{re.escape(path.stem)}\.\d+{re.escape(path.suffix)}")
    for other in sorted(path.parent.glob("*")):
        if name.fullmatch(other.name):
            _copy(other, path)


def spread(path: str | pathlib.Path) -> None:
    """Copies the leader's answers into the stores of all other processes of this run."""
    for number in range(1, jax.process_count()):
        _copy(pathlib.Path(path), of_process(path, number))


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies what the target lacks; it keeps its own answers."""
    with AnswerStore(source, read_only=True) as held, AnswerStore(target) as store:
        for teacher in held.teachers():
            store.add_teacher(teacher)
        for one in held.all():
            if not store.get([one.key]):
                store.put(one.fingerprint, [(one.key, one.kind, one.answer)])
