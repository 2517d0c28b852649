"""What the tool says of a store, and the Parquet file that it makes of one."""

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from stored_answers import BIG, answer, filled, items, key, teacher

from gkdjax.teachers.server.answers import lost_sample
from gkdjax.teachers.server.store import answers, codec
from gkdjax.teachers.server.store.answers import AnswerStore
from gkdjax.tools import store_info


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Three score answers, two samples, of which one is lost, and a teacher without any."""
    monkeypatch.setattr(answers.time, "time", iter([86_400.0 * 3, 86_400.0 * 400]).__next__)
    partly = answer(4, n=3)
    partly.top_logprobs[1, 2:] = -np.inf
    finished = dataclasses.replace(partly, finished=True)
    with filled(tmp_path / "store.db", 1, 2, 3) as made:
        made.put(
            BIG.fingerprint, [(key(4), "sample", finished), (key(5), "sample", lost_sample(5, 2))]
        )
        made.add_teacher(teacher(101, model="small"))
    return tmp_path / "store.db"


def run(*args) -> int:
    return store_info.main([str(arg) for arg in args])


def test_the_table(path, capsys):
    before = hashlib.sha256(path.read_bytes()).digest()
    assert run(path) == 0
    header, _, sample, score, small, total, _, size = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["model", "fingerprint"]
    names = ["big", BIG.fingerprint[:12], BIG.tokenizer[:12]]
    num_bytes = sum(len(codec.encode(answer(i))) for i in (1, 2, 3))
    sizes = ["3", "12", f"{num_bytes:,}", f"{num_bytes / 12:.1f}"]
    assert score.split() == [*names, "score", *sizes, "1970-01-04", "1970-01-04"]
    assert sample.split()[3:6] == ["sample", "2", "3"]
    assert sample.split()[-1] == "1971-02-05"
    assert small.split()[0] == "small" and small.split()[3:] == ["-", "0", "0", "0", *3 * "-"]
    assert total.split()[:3] == ["total", "5", "15"]
    assert size == f"{path.stat().st_size:,} bytes on disk"
    assert hashlib.sha256(path.read_bytes()).digest() == before


def test_the_command_in_a_process_of_its_own(path):
    command = [sys.executable, "-m", "gkdjax.tools.store_info"]
    done = subprocess.run([*command, path], capture_output=True, text=True, check=True)
    assert "bytes on disk" in done.stdout and done.stderr == ""


def test_the_export_has_everything(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(store_info, "_ROWS", 2)
    file = tmp_path / "answers.parquet"
    assert run(path, f"--export={file}") == 0
    assert f"5 answers written to {file}" in capsys.readouterr().out
    with pyarrow.parquet.ParquetFile(file) as opened:
        assert opened.num_row_groups == 3
        read = opened.read()
    ids, logprobs = pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.float32())
    kinds = {field.name: field.type for field in read.schema}
    assert (kinds["target_ids"], kinds["top_ids"]) == (ids, pyarrow.list_(ids))
    assert (kinds["tail_logprobs"], kinds["top_logprobs"]) == (logprobs, pyarrow.list_(logprobs))
    rows = read.to_pylist()
    with AnswerStore(path, read_only=True) as opened:
        stored = list(opened.all())
    for row, (name, fingerprint, kind, created, kept) in zip(rows, stored, strict=True):
        assert (row["key"], row["fingerprint"], row["kind"]) == (name, fingerprint, kind)
        assert row["model"] == "big" and row["created"].timestamp() == created
        assert (row["finished"], row["lost"]) == (kept.finished, kept.lost)
        assert row["target_ids"] == kept.target_ids.tolist()
        assert row["target_logprobs"] == kept.target_logprob.tolist()
        assert row["tail_logprobs"] == kept.tail_logprob.tolist()
        there = kept.top_logprobs > -np.inf
        top = [row[mask].tolist() for row, mask in zip(kept.top_logprobs, there, strict=True)]
        assert row["top_logprobs"] == top
        top = [row[mask].tolist() for row, mask in zip(kept.top_ids, there, strict=True)]
        assert row["top_ids"] == top
    assert [len(top) for top in rows[3]["top_logprobs"]] == [5, 2, 5]
    assert [row["lost"] for row in rows] == [False] * 4 + [True]
    assert rows[3]["finished"] and rows[4]["top_ids"] == []


def test_an_empty_store_becomes_an_empty_file(tmp_path, capsys):
    AnswerStore(tmp_path / "store").close()
    assert run(tmp_path / "store", f"--export={tmp_path / 'a.parquet'}") == 0
    assert pyarrow.parquet.read_table(tmp_path / "a.parquet").num_rows == 0


def test_while_a_run_writes(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store_info, "_ROWS", 2)
    monkeypatch.setattr(answers, "_PAGE_ROWS", 2)
    late = teacher(102, model="late")
    columns = store_info._columns
    with AnswerStore(path) as writer:
        monkeypatch.setattr(answers.time, "time", lambda: 0.0)

        def then_more_comes(*args):
            writer.add_teacher(late)
            writer.put(late.fingerprint, items(9))
            return columns(*args)

        monkeypatch.setattr(store_info, "_columns", then_more_comes)
        assert run(path, f"--export={tmp_path / 'a.parquet'}") == 0
    read = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert read["model"].to_pylist() == [*5 * ["big"], "late"]


def test_what_goes_wrong_is_one_line(path, tmp_path, capsys, monkeypatch):
    there = tmp_path / "there.parquet"
    there.write_text("mine")
    for args, message in (
        ((tmp_path / "none",), f"{tmp_path / 'none'} (config.teacher.store): there is no such"),
        ((there,), "no store of answers"),
        ((path, f"--export={there}"), f"{there} is there already"),
        ((path, f"--export={tmp_path / 'no' / 'a.parquet'}"), "cannot be written"),
    ):
        assert run(*args) == 2
        err = capsys.readouterr().err
        assert err.startswith("store_info: ") and err.count("\n") == 1 and message in err
    assert there.read_text() == "mine"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(path, f"--export={tmp_path / 'a.parquet'}") == 2
    assert "needs pyarrow, which is not installed: pip install" in capsys.readouterr().err


def test_a_damaged_answer_leaves_no_file(path, tmp_path, capsys):
    data = path.read_bytes()
    at = data.index(codec.encode(answer(2))[4:])
    path.write_bytes(data[: at + 30] + bytes([data[at + 30] ^ 1]) + data[at + 31 :])
    assert run(path, f"--export={tmp_path / 'a.parquet'}") == 2
    assert f"answer {key(2)} is damaged" in capsys.readouterr().err
    assert not list(tmp_path.glob("a.parquet*"))
