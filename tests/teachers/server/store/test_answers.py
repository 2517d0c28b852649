"""The store of answers: what was put is there, once, for all who ask."""

import concurrent.futures
import dataclasses
import os
import shutil
import sqlite3
import subprocess
import sys

import pytest
from stored_answers import (
    BIG,
    answer,
    assert_holds,
    filled,
    items,
    key,
    missing,
    noisy,
    same,
    teacher,
)

from gkdjax.teachers.server.store import answers, codec
from gkdjax.teachers.server.store.answers import AnswerStore
from gkdjax.utils.errors import UserError


def test_what_was_put_is_there_when_it_is_opened_again(tmp_path):
    path = tmp_path / "deep" / "er" / "what? 100%.db"
    with filled(path, 1, 2) as made:
        assert_holds(made, 1, 2)
    with AnswerStore(path) as again:
        assert_holds(again, 1, 2)
        assert missing(again, [key(3), key(1), key(4)]) == {key(3), key(4)}
        assert list(again.get([key(3), key(1), key(1)])) == [key(1)]
        assert again.get([]) == {}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_it_is_on_the_disk_when_put_returns(tmp_path):
    """A killed process cannot show it; only a power cut would."""
    with filled(tmp_path / "store", 1) as made:
        settings = [made._rows(f"PRAGMA {name}") for name in ("journal_mode", "synchronous")]
    assert settings == [[("wal",)], [(2,)]]  # 2 is FULL


def test_the_first_answer_stays(tmp_path):
    with filled(tmp_path / "store", 1) as made:
        made.put(BIG.fingerprint, [(key(1), "score", answer(9)), (key(2), "sample", answer(2))])
        assert_holds(made, 1, 2)


def test_all_or_nothing_is_put(tmp_path):
    with filled(tmp_path / "store", 1) as made:
        for fingerprint, kind in (("unknown", "score"), (BIG.fingerprint, "other")):
            with pytest.raises(sqlite3.IntegrityError):
                made.put(fingerprint, [*items(2), (key(3), kind, answer(3))])
        assert missing(made, [key(2), key(3)]) == {key(2), key(3)}
        made.put(BIG.fingerprint, items(2))
        assert_holds(made, 1, 2)


def test_it_tells_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "_PAGE_ROWS", 2)
    monkeypatch.setattr(answers.time, "time", iter([1000.9, 2000.0, 3000.0]).__next__)
    other = teacher(101)
    with filled(tmp_path / "store", 1, 2, 3) as made:
        made.put(BIG.fingerprint, [(key(4), "sample", answer(4, n=7))])
        made.put(BIG.fingerprint, items(5))
        made.add_teacher(other)
        held = {(h.fingerprint, h.kind): h for h in made.summary()}
        assert len(held) == 3
        scores = held[BIG.fingerprint, "score"]
        assert (scores.answers, scores.tokens) == (4, 16)
        assert (scores.first, scores.last) == (1000, 3000)
        assert scores.num_bytes == sum(len(codec.encode(answer(i))) for i in (1, 2, 3, 5))
        samples = held[BIG.fingerprint, "sample"]
        assert (samples.answers, samples.tokens, samples.first) == (1, 7, 2000)
        none = held[other.fingerprint, None]
        assert (none.answers, none.tokens, none.num_bytes, none.first) == (0, 0, 0, None)
        assert (none.model, none.tokenizer) == (other.model, other.tokenizer)
        everything = list(made.all())
        assert [row.key for row in everything] == [key(i) for i in (1, 2, 3, 4, 5)]
        assert everything[3][1:4] == (BIG.fingerprint, "sample", 2000)
        assert same(everything[3].answer, answer(4, n=7))
        beside = sum(file.stat().st_size for file in tmp_path.iterdir() if file.suffix != "-shm")
        shm = (tmp_path / "store-shm").stat().st_size
        assert made.num_bytes() == beside - shm > 0


def test_a_row_is_read_as_it_was_always_written(tmp_path):
    path = tmp_path / "store"
    filled(path).close()
    about = f"{key(1)}\n{BIG.fingerprint}\nscore\n4\n1700000000".encode()
    row = (bytes.fromhex(key(1)), BIG.fingerprint, "score", 4, 1700000000)
    connection = sqlite3.connect(path)
    connection.execute(
        "INSERT INTO answers (key, fingerprint, kind, tokens, created, payload)"
        " VALUES(?, ?, ?, ?, ?, ?)",
        (*row, codec.encode(answer(1), about)),
    )
    connection.commit()
    connection.close()
    with AnswerStore(path) as opened:
        assert_holds(opened, 1)


def test_threads(tmp_path):
    with filled(tmp_path / "store") as made, concurrent.futures.ThreadPoolExecutor(8) as pool:

        def work(thread: int) -> None:
            for i in range(6):
                made.put(BIG.fingerprint, items(i, 100 + 10 * thread + i))
                assert_holds(made, i, 100 + 10 * thread + i)
                missing(made, [key(i)])
                made.teachers()

        for done in [pool.submit(work, thread) for thread in range(8)]:
            done.result()
        assert made.summary()[0].answers == 6 + 8 * 6


TWO = """
import os, sys
sys.path[:0] = [os.getcwd(), "tests"]
import stored_answers
print(flush=True)
sys.stdin.readline()
made = stored_answers.filled(sys.argv[1])
for i in range(30):
    made.put(stored_answers.BIG.fingerprint, stored_answers.items(i, 1000 + i))
made.close()
"""


def test_two_processes_make_and_fill_one_store(tmp_path):
    path = tmp_path / "store"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", TWO, path], **pipes) as other:
        other.stdout.readline()
        print(file=other.stdin, flush=True)
        with filled(path) as made:
            for i in range(30):
                made.put(BIG.fingerprint, items(i, 2000 + i))
            other.communicate()
            assert other.returncode == 0
            assert_holds(made, *range(30), *range(1000, 1030), *range(2000, 2030))


def test_read_only(tmp_path, monkeypatch):
    path = tmp_path / "store"
    with filled(path, 1) as writer, AnswerStore(path, read_only=True) as reader:
        assert_holds(reader, 1)
        writer.put(BIG.fingerprint, items(2))
        assert_holds(reader, 1, 2)
        with pytest.raises(UserError, match="may not be written; change its permissions"):
            reader.put(BIG.fingerprint, items(3))
        writer.put(BIG.fingerprint, items(4))
    # From a disk on which nobody can write.
    archive = tmp_path / "archive"
    archive.mkdir()
    shutil.copy(path, archive)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with AnswerStore(archive / "store", read_only=True) as reader:
        assert_holds(reader, 1, 2, 4)
        assert os.listdir(archive) == ["store"]


def test_teachers_are_recognised(tmp_path):
    newer = teacher(101, checked="2026-11-24T00:00:00+00:00")
    with filled(tmp_path / "store") as made:
        made.add_teacher(newer)
        made.add_teacher(teacher(100, tokenizer="cd" * 32))
        made.add_teacher(teacher(100, model="small"))
    with AnswerStore(tmp_path / "store") as again:
        assert len(again.teachers()) == 4
        found, other, *_ = again.teachers()
        assert other.fingerprint == newer.fingerprint
        assert dataclasses.replace(found, probe=BIG.probe) == BIG
        assert same(found.probe, BIG.probe)


def test_a_teacher_checked_again_keeps_its_first_probe(tmp_path):
    with filled(tmp_path / "store", 1) as made:
        change = {"findings": {"top_k": 3}, "checked": "2027-01-01T00:00:00+00:00"}
        fresh = dataclasses.replace(BIG, probe=noisy(BIG.probe, 0.01), **change)
        made.add_teacher(fresh)
        (known,) = made.teachers()
        assert (known.findings, known.checked) == (fresh.findings, fresh.checked)
        assert same(known.probe, BIG.probe)
        assert_holds(made, 1)
