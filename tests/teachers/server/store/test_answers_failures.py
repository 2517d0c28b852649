"""The store of answers when processes are killed, and where the file or the disk fails it."""

import resource
import signal
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pytest
from stored_answers import BIG, answer, assert_holds, filled, items, key, missing, same

from gkdjax.teachers.server.store import answers
from gkdjax.teachers.server.store.answers import AnswerStore
from gkdjax.utils.errors import UserError

KILLED = """
import os, signal, sqlite3, sys
sys.path[:0] = [os.getcwd(), "tests"]
import stored_answers

class Dies(sqlite3.Connection):
    def executemany(self, statement, rows):
        rows = list(rows)
        super().executemany(statement, rows[:-1])
        if len(rows) > 3:  # in the middle of a transaction, much of it on the disk
            super().execute("PRAGMA cache_spill=1")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().executemany(statement, rows[-1:])

real = sqlite3.connect
sqlite3.connect = lambda *args, **kwargs: real(*args, factory=Dies, **kwargs)
made = stored_answers.filled(sys.argv[1], 1, 2)
if sys.argv[2] == "after":
    os.kill(os.getpid(), signal.SIGKILL)
made.put(stored_answers.BIG.fingerprint, stored_answers.items(3, 4, 5, 6))
"""


def test_a_killed_process_loses_nothing_and_leaves_nothing_half(tmp_path):
    paths = {when: tmp_path / when for when in ("after", "within")}
    command = [sys.executable, "-c", KILLED]
    processes = [
        subprocess.Popen([*command, path, when], stderr=subprocess.PIPE, text=True)
        for when, path in paths.items()
    ]
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
    for path in paths.values():
        for read_only in (True, False):
            with AnswerStore(path, read_only=read_only) as left:
                assert_holds(left, 1, 2)
                assert left.get([key(i) for i in range(3, 7)]) == {}


def test_what_is_no_store_is_refused_and_left_alone(tmp_path):
    text, foreign, old, empty = (tmp_path / name for name in ("text", "foreign", "old", "empty"))
    text.write_text("key,answer\n" * 200)
    foreign.touch()
    empty.touch()
    filled(old, 1).close()
    for path, statement in ((foreign, "CREATE TABLE t(a)"), (old, "PRAGMA user_version=7")):
        connection = sqlite3.connect(path)
        connection.execute(statement)
        connection.close()
    for path, message in (
        (text, "not a database: it is no store of answers; name another file"),
        (foreign, "is a database of something else; name another file"),
        (old, "is of version 7, and this code reads version 1: use the code that made it"),
        (tmp_path, "unable to open database file: check that it is a file"),
        (text / "store", "cannot be made"),
    ):
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(UserError, match=message) as error:
            AnswerStore(path)
        assert str(error.value).startswith(f"{path} (config.teacher.store)")
        assert before is None or path.read_bytes() == before
    for path, message in ((tmp_path / "none", "there is no such file"), (empty, "it is empty")):
        with pytest.raises(UserError, match=message):
            AnswerStore(path, read_only=True)
    assert not (tmp_path / "none").exists()
    filled(empty, 1).close()  # an empty file is what a killed process can leave


def damage(path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert len(old) == len(new) and data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def test_a_damaged_answer_is_an_error_and_no_miss(tmp_path):
    path = tmp_path / "store"
    filled(path, 1, 2).close()
    stored = sqlite3.connect(path)
    (data,) = stored.execute("SELECT payload FROM answers WHERE rowid = 1").fetchone()
    stored.close()
    damage(path, data[-9:], bytes([data[-9] ^ 4]) + data[-8:])
    with AnswerStore(path) as opened:
        assert_holds(opened, 2)
        for read in (lambda: opened.get([key(2), key(1)]), lambda: list(opened.all())):
            with pytest.raises(UserError, match=f"answer {key(1)} is damaged.*checksum") as error:
                read()
            assert str(path) in str(error.value)


def test_flipped_bits_anywhere_never_give_a_wrong_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "_BUSY_SECONDS", 0.05)
    whole, path = tmp_path / "whole", tmp_path / "damaged"
    filled(whole, 1, 2, 3).close()
    data = whole.read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for at in rng.permutation(np.flatnonzero(np.frombuffer(data, np.uint8)))[:300]:
        for left in tmp_path.glob("damaged*"):
            left.unlink()
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :])
        try:
            with AnswerStore(path) as opened:
                assert all(known.findings == BIG.findings for known in opened.teachers())
                for number in (1, 2, 3):
                    for found in opened.get([key(number)]).values():
                        assert same(found, answer(number))
                list(opened.all())
                opened.summary()
            outcomes.add("fine")
        except UserError as error:
            assert str(path) in str(error)
            outcomes.add("error")
    assert outcomes == {"fine", "error"}


def test_an_answer_under_another_key_is_seen(tmp_path):
    path = tmp_path / "store"
    filled(path, 1, 2).close()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE answers SET payload = (SELECT MAX(payload) FROM answers)")
    connection.commit()
    connection.close()
    with AnswerStore(path) as opened, pytest.raises(UserError, match="is damaged"):
        opened.get([key(1), key(2)])


def test_a_torn_file_is_an_error(tmp_path):
    path = tmp_path / "store"
    filled(path, *range(20)).close()
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(UserError, match="malformed: it is damaged; put a copy of it in its place"):
        AnswerStore(path).get([key(19)])


def test_a_full_disk(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with filled(tmp_path / "store", 1) as made:
        size = (tmp_path / "store-wal").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10_000, limits[1]))
        try:
            with pytest.raises(UserError, match="check its disk, and that there is room"):
                made.put(BIG.fingerprint, items(*range(2, 60)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert missing(made, [key(2)])
        made.put(BIG.fingerprint, items(3))
        assert_holds(made, 1, 3)
    with AnswerStore(tmp_path / "store") as again:
        assert_holds(again, 1, 3)


def test_locked_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "_BUSY_SECONDS", 0.05)
    with filled(tmp_path / "store", 1) as made:
        other = sqlite3.connect(tmp_path / "store", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match="locked: another process holds it for long"):
            made.put(BIG.fingerprint, items(2))
        assert_holds(made, 1)  # who reads does not wait
        other.execute("ROLLBACK")
        other.close()
        made.put(BIG.fingerprint, items(2))


def test_a_new_file_that_another_process_is_making(tmp_path):
    path = tmp_path / "store"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    soon = threading.Timer(0.05, other.execute, ["COMMIT"])
    soon.start()
    filled(path, 1).close()  # SQLite says at once that the file is locked
    soon.join()
    other.close()
    with AnswerStore(path) as opened:
        assert_holds(opened, 1)
