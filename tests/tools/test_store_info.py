"""The table of a store, and the Parquet file that is made of one."""

import dataclasses
import hashlib
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
        present = kept.top_logprobs > -np.inf
        top_ids, top_logprobs = (
            [values[mask].tolist() for values, mask in zip(both, present, strict=True)]
            for both in (kept.top_ids, kept.top_logprobs)
        )
        assert row.pop("created").timestamp() == created
        assert row == {
            **{"key": name, "fingerprint": fingerprint, "kind": kind, "model": "big"},
            **{"finished": kept.finished, "lost": kept.lost},
            **{"target_ids": kept.target_ids.tolist(), "top_ids": top_ids},
            **{"target_logprobs": kept.target_logprob.tolist(), "top_logprobs": top_logprobs},
            "tail_logprobs": kept.tail_logprob.tolist(),
        }
    assert [len(top) for top in rows[3]["top_logprobs"]] == [5, 2, 5]
    assert [row["lost"] for row in rows] == [False] * 4 + [True]
    assert rows[3]["finished"] and rows[4]["top_ids"] == []


def test_an_empty_store_becomes_an_empty_file(tmp_path):
    AnswerStore(tmp_path / "store").close()
    assert run(tmp_path / "store", f"--export={tmp_path / 'a.parquet'}") == 0
    assert pyarrow.parquet.read_table(tmp_path / "a.parquet").num_rows == 0


def test_while_a_run_writes(path, tmp_path, monkeypatch):
    monkeypatch.setattr(store_info, "_ROWS", 2)
    monkeypatch.setattr(answers, "_PAGE_ROWS", 2)
    late, row = teacher(102, model="late"), store_info._row
    with AnswerStore(path) as writer:
        monkeypatch.setattr(answers.time, "time", lambda: 0.0)

        def then_more_comes(*args):
            writer.add_teacher(late)
            writer.put(late.fingerprint, items(9))
            return row(*args)

        monkeypatch.setattr(store_info, "_row", then_more_comes)
        assert run(path, f"--export={tmp_path / 'a.parquet'}") == 0
    read = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert read["model"].to_pylist() == [*5 * ["big"], "late"]


def test_errors_are_one_line_and_leave_no_file(path, tmp_path, capsys, monkeypatch):
    there, new = tmp_path / "there.parquet", tmp_path / "a.parquet"
    there.write_text("mine")

    def error(*args) -> str:
        assert run(*args) == 2
        text = capsys.readouterr().err
        assert text.startswith("store_info: ") and text.count("\n") == 1
        assert not list(tmp_path.glob("a.parquet*"))
        return text

    assert f"{tmp_path / 'none'} (config.teacher.store): there is no" in error(tmp_path / "none")
    assert "no store of answers" in error(there)
    assert f"{there} is there already" in error(path, f"--export={there}")
    assert "cannot be written" in error(path, f"--export={tmp_path / 'no' / 'a.parquet'}")
    assert there.read_text() == "mine"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        printed = error(path, f"--export={new}")
    assert "needs pyarrow, which is not installed: pip install" in printed
    data = path.read_bytes()
    at = data.index(codec.encode(answer(2))[4:])
    path.write_bytes(data[: at + 30] + bytes([data[at + 30] ^ 1]) + data[at + 31 :])
    assert f"answer {key(2)} is damaged" in error(path, f"--export={new}")
