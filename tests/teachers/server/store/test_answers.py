"""The store of answers: what was put is there, once, for all who ask, or an error says why not."""

import concurrent.futures
import contextlib
import dataclasses
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pytest
from stored_answers import BIG, answer, assert_holds, filled, items, key, noisy, same, teacher

from gkdjax.teachers.server.store import answers, codec
from gkdjax.teachers.server.store.answers import AnswerStore
from gkdjax.utils.errors import NotWritten, UserError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


def changed(path, *statements) -> None:
    """Changes the file behind the back of the store."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(*statement)
        connection.commit()


def test_what_was_put_is_there_when_it_is_opened_again(tmp_path):
    path = tmp_path / "deep" / "er" / "what? 100%.db"
    with filled(path, 1, 2) as made:
        assert_holds(made, 1, 2)
        # On the disk when `put` returns: only a power cut would show it; 2 is FULL.
        settings = [made._rows(f"PRAGMA {name}") for name in ("journal_mode", "synchronous")]
        assert settings == [[("wal",)], [(2,)]]
    with AnswerStore(path) as again:
        assert_holds(again, 1, 2, of=range(5))
        assert list(again.get([key(3), key(1), key(1)])) == [key(1)]
        # The first answer stays.
        again.put(BIG.fingerprint, [(key(1), "score", answer(9)), (key(2), "sample", answer(2))])
        assert_holds(again, 1, 2)
        # All are put, or none.
        for fingerprint, kind in (("unknown", "score"), (BIG.fingerprint, "other")):
            with pytest.raises(sqlite3.IntegrityError):
                again.put(fingerprint, [*items(3), (key(4), kind, answer(4))])
        assert_holds(again, 1, 2, of=range(5))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_it_tells_what_it_holds(path, monkeypatch):
    monkeypatch.setattr(answers, "_PAGE_ROWS", 2)
    monkeypatch.setattr(answers.time, "time", iter([1000.9, 2000.0, 3000.0]).__next__)
    other = teacher(101)
    with filled(path, 1, 2, 3) as made:
        made.put(BIG.fingerprint, [(key(4), "sample", answer(4, n=7))])
        made.put(BIG.fingerprint, items(5))
        made.add_teacher(other)
        held = {(h.fingerprint, h.kind): h[4:] for h in made.summary()}
        sizes = [len(codec.encode(answer(i))) for i in (1, 2, 3, 5)]
        sample = len(codec.encode(answer(4, n=7)))
        assert held == {
            (BIG.fingerprint, "score"): (4, 16, sum(sizes), 1000, 3000),
            (BIG.fingerprint, "sample"): (1, 7, sample, 2000, 2000),
            (other.fingerprint, None): (0, 0, 0, None, None),
        }
        everything = list(made.all())
        assert [row.key for row in everything] == [key(i) for i in (1, 2, 3, 4, 5)]
        assert everything[3][1:4] == (BIG.fingerprint, "sample", 2000)
        assert same(everything[3].answer, answer(4, n=7))
        parts = (path, path.with_name("store-wal"))
        assert made.num_bytes() == sum(part.stat().st_size for part in parts)


def test_a_row_is_read_as_it_was_always_written(path):
    filled(path).close()
    context = f"{key(1)}\n{BIG.fingerprint}\nscore\n4\n1700000000".encode()
    row = bytes.fromhex(key(1)), BIG.fingerprint, "score", 4, 1700000000
    names = "key, fingerprint, kind, tokens, created, payload"
    statement = f"INSERT INTO answers ({names}) VALUES(?, ?, ?, ?, ?, ?)"
    changed(path, (statement, (*row, codec.encode(answer(1), context))))
    with AnswerStore(path) as opened:
        assert_holds(opened, 1)


def test_teachers_and_a_first_probe_are_kept(path):
    others = teacher(101), teacher(100, tokenizer="cd" * 32), teacher(100, model="small")
    with filled(path, 1) as made:
        for other in others:
            made.add_teacher(other)
        change = {"findings": {"top_k": 3}, "checked": "2027-01-01T00:00:00+00:00"}
        made.add_teacher(dataclasses.replace(BIG, probe=noisy(BIG.probe, 0.01), **change))
    with AnswerStore(path) as again:
        found = again.teachers()
        assert_holds(again, 1)
    expected = [dataclasses.replace(BIG, **change), *others]
    for one, other in zip(found, expected, strict=True):
        assert same(one.probe, other.probe) and dataclasses.replace(one, probe=other.probe) == other


def test_threads(path):
    with filled(path) as made, concurrent.futures.ThreadPoolExecutor(8) as pool:

        def work(thread: int) -> None:
            for i in range(6):
                made.put(BIG.fingerprint, items(i, 100 + 10 * thread + i))
                assert_holds(made, i, 100 + 10 * thread + i)
                made.teachers()

        for done in [pool.submit(work, thread) for thread in range(8)]:
            done.result()
        assert made.summary()[0].answers == 6 + 8 * 6


HEAD = """
import os, signal, sqlite3, sys
sys.path[:0] = [os.getcwd(), "tests"]
import stored_answers
"""
TWO = """
print(flush=True)
sys.stdin.readline()
made = stored_answers.filled(sys.argv[1])
for i in range(30):
    made.put(stored_answers.BIG.fingerprint, stored_answers.items(i, 1000 + i))
made.close()
"""
KILLED = """
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


def other_process(script: str, *args) -> subprocess.Popen:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", HEAD + script, *args], text=True, **pipes)


def test_two_processes_make_and_fill_one_store(path):
    """SQLite's locks between processes differ from those between threads."""
    with other_process(TWO, path) as other:
        other.stdout.readline()
        print(file=other.stdin, flush=True)
        with filled(path) as made:
            for i in range(30):
                made.put(BIG.fingerprint, items(i, 2000 + i))
            _, err = other.communicate()
            assert other.returncode == 0, err
            assert_holds(made, *range(30), *range(1000, 1030), *range(2000, 2030))


def test_a_killed_process_loses_nothing_and_leaves_nothing_half(tmp_path):
    """Only a process can be killed."""
    processes = {when: other_process(KILLED, tmp_path / when, when) for when in ("after", "within")}
    for when, process in processes.items():
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
        for read_only in (True, False):
            with AnswerStore(tmp_path / when, read_only=read_only) as left:
                assert_holds(left, 1, 2, of=range(7))


def test_read_only(path, tmp_path, monkeypatch):
    with filled(path, 1) as writer, AnswerStore(path, read_only=True) as reader:
        assert_holds(reader, 1)
        writer.put(BIG.fingerprint, items(2))
        assert_holds(reader, 1, 2)
        with pytest.raises(UserError, match="may not be written; change its permissions"):
            reader.put(BIG.fingerprint, items(3))
        writer.put(BIG.fingerprint, items(4))
    archive = tmp_path / "archive"  # on a disk on which nobody can write
    archive.mkdir()
    shutil.copy(path, archive)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with AnswerStore(archive / "store", read_only=True) as reader:
        assert_holds(reader, 1, 2, 4)
        assert os.listdir(archive) == ["store"]


@pytest.mark.parametrize(
    "name, read_only, message",
    [
        ("text", False, "not a database: it is no store of answers; name another file"),
        ("foreign", False, "is a database of something else; name another file"),
        ("old", False, "is of version 7, and this code reads version 1: use the code that made it"),
        (".", False, "is a directory; name a file"),
        (".", True, "is a directory; name a file"),
        ("text/store", False, "cannot be made"),
        ("none", True, "there is no such file"),
        ("empty", True, "it is empty"),
        ("torn", False, "malformed: it is damaged; put a copy of it in its place"),
    ],
)
def test_what_is_no_store_is_refused_and_left_alone(tmp_path, name, read_only, message):
    path = tmp_path / name
    (tmp_path / "text").write_text("key,answer\n" * 200)
    (tmp_path / "empty").touch()
    changed(tmp_path / "foreign", ["CREATE TABLE t(a)"])
    filled(tmp_path / "old", 1).close()
    changed(tmp_path / "old", ["PRAGMA user_version=7"])
    filled(tmp_path / "torn", *range(20)).close()
    os.truncate(tmp_path / "torn", 9000)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(UserError, match=message) as error:
        AnswerStore(path, read_only=read_only).get([key(19)])
    assert str(error.value).startswith(f"{path} (config.teacher.store)")
    assert (path.read_bytes() if path.is_file() else None) == before


def test_an_empty_file_is_what_a_killed_process_can_leave(path):
    path.touch()
    with filled(path, 1) as made:
        assert_holds(made, 1)


def test_a_damaged_answer_is_an_error_and_no_miss(path):
    filled(path, 1, 2).close()
    data = path.read_bytes()
    payload = codec.encode(answer(1))[-9:]  # the rest of it depends on the time
    assert data.count(payload) == 1
    path.write_bytes(data.replace(payload, bytes([payload[0] ^ 4]) + payload[1:]))
    with AnswerStore(path) as opened:
        assert_holds(opened, 2)
        for read in (lambda: opened.get([key(2), key(1)]), lambda: list(opened.all())):
            with pytest.raises(UserError, match=f"store.*answer {key(1)} is damaged.*checksum"):
                read()


def test_an_answer_under_another_key_is_seen(path):
    filled(path, 1, 2).close()
    changed(path, ["UPDATE answers SET payload = (SELECT MAX(payload) FROM answers)"])
    with AnswerStore(path) as opened, pytest.raises(UserError, match="is damaged"):
        opened.get([key(1), key(2)])


def test_flipped_bits_anywhere_never_give_a_wrong_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "_BUSY_SECONDS", 0.05)
    whole, path = tmp_path / "whole", tmp_path / "damaged"
    filled(whole, 1, 2, 3).close()
    data = whole.read_bytes()
    rng, outcomes = np.random.default_rng(0), set()
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


def test_a_full_disk(path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with filled(path, 1) as made:
        size = path.with_name("store-wal").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10_000, limits[1]))
        try:
            with pytest.raises(NotWritten, match=r"there is room; .* are free there"):
                made.put(BIG.fingerprint, items(*range(2, 60)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        made.put(BIG.fingerprint, items(3))
    with AnswerStore(path) as again:
        assert_holds(again, 1, 3, of=range(60))


def test_locked_for_long(path, monkeypatch):
    monkeypatch.setattr(answers, "_BUSY_SECONDS", 0.05)
    with filled(path, 1) as made:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(UserError, match="locked: another process holds it for long"):
                made.put(BIG.fingerprint, items(2))
            assert_holds(made, 1)  # who reads does not wait
        made.put(BIG.fingerprint, items(2))


def test_a_new_file_that_another_process_is_making(path):
    how = {"isolation_level": None, "check_same_thread": False}
    with contextlib.closing(sqlite3.connect(path, **how)) as other:
        other.execute("BEGIN IMMEDIATE")
        soon = threading.Timer(0.05, other.execute, ["COMMIT"])
        soon.start()
        filled(path, 1).close()  # SQLite says at once that the file is locked
        soon.join()
    with AnswerStore(path) as opened:
        assert_holds(opened, 1)
