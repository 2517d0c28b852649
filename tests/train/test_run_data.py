"""Whole runs on data and prefixes as they stand in files."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from small_runs import PREFIX, ConstantTeacher, losses_hex, metrics, small

import gkdjax
from gkdjax.data.chat_template import load_chat
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import read_lines

_OWN = [{"role": "system", "content": "be loud"}]


def _talk(*said: str) -> list[dict]:
    roles = ("user", "assistant") * len(said)
    return [{"role": role, "content": words} for role, words in zip(roles, said, strict=False)]


class Listening(ConstantTeacher):
    """Keeps the first prompts that it is asked to answer, and goes."""

    heard: tuple = ()

    def sample(self, prompts, seeds, sampling):
        self.heard = [prompt.ids for prompt in prompts]
        raise ConnectionError("gone")


def test_a_parquet_file_and_a_prefix_file_are_the_same_run_as_the_config_with_both(
    student, tmp_path
):
    rows = [
        {"question": f"ask {i}", "output": output, "prefix_messages": _OWN if i == 2 else None}
        for i, output in enumerate((None, "yo") * 3)
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "p.yaml").write_text("- role: system\n  content: be brief\n")
    c = small(student, data__train=rows, train__steps=2)
    gkdjax.run(c, tmp_path / "config")
    c.context.prefix_messages, c.context.prefix_file = (), str(tmp_path / "p.yaml")
    c.data.train = str(tmp_path / "x.parquet")
    gkdjax.run(c, tmp_path / "files")
    assert losses_hex(tmp_path / "files") == losses_hex(tmp_path / "config")
    assert all(line["loss"] > 1e-3 for line in metrics(tmp_path / "files"))
    written = read_lines(tmp_path / "files" / "trajectories_train.jsonl")
    assert [line["row"] for line in written] == [f"x.parquet:{i}" for i in (0, 2, 4)]


def test_the_teacher_writes_after_the_rows_own_prefix_or_the_global_one_or_none(student, tmp_path):
    (tmp_path / "p.txt").write_text("be brief\n")
    rows = [
        {"prompt": "ask 0", "prefix_messages": _OWN},
        {"prompt": "ask 1", "prefix_messages": []},
        {"prompt": "ask 2"},
        {"prompt": "ask 3", "prefix_messages": None},
    ]
    c = small(student, teacher__top_k=1, train__steps=1, data__train=rows)
    c.context.prefix_messages = ()
    for prompt_file, read in (
        (str(tmp_path / "p.txt"), ["be loud", "be brief", "be brief", "be brief"]),
        ("", ["be loud", "", "", ""]),  # a dataset with prefixes of its own, and no global one
    ):
        c.context.system_prompt_file = prompt_file
        teacher = Listening(50, 5)
        with pytest.raises(ConnectionError):
            gkdjax.run(c, tmp_path / f"run {bool(prompt_file)}", teacher=teacher)
        heard = [load_chat(student).decode(ids) for ids in teacher.heard]
        for i, (text, prefix) in enumerate(zip(heard, read, strict=True)):
            assert text.startswith(f"user\n{prefix}\n\nask {i}" if prefix else f"user\nask {i}")


def test_a_conversation_bakes_its_own_history(student, tmp_path):
    talks = [_talk("aa", "bb", f"c{i}", "dd", "ee") for i in range(3)]
    source = tmp_path / "x.jsonl"
    source.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    c = small(student, context__prefix_messages=(), context__history_as_prefix=True)
    c.data.train, c.data.max_length, c.data.bucket_lengths = str(source), 128, (64, 128)
    c.eval.prompts = [{"messages": _talk("ff", "gg", "hh")}]
    results = gkdjax.run(c, tmp_path / "run")
    written = read_lines(tmp_path / "run" / "trajectories_train.jsonl")
    assert [line["row"] for line in written] == [f"x.jsonl:{i}[5]" for i in (1, 2, 3)]
    assert all(line["loss"] > 1e-3 for line in metrics(tmp_path / "run"))
    assert results["samples"]["question"] == ["hh", "aa", "c0"]  # the last held-out turn alone
    # The held-out student does not read "ff" and "gg", either.
    assert results["base"]["forward_kl"] > 1e-3 > results["prompted_base"]["forward_kl"]
    c.context.student_retained_turns = 99
    with pytest.raises(UserError, match="loss would be zero"):
        gkdjax.run(c, tmp_path / "all")


def test_an_anchor_row_under_the_prefix_of_a_file_is_refused(student, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(PREFIX))
    c = small(student, context__prefix_messages=(), context__prefix_file=str(tmp_path / "p.json"))
    c.anchor.data = [{"prompt": "other", "prefix_messages": PREFIX}]
    with pytest.raises(UserError, match=r"anchor\.data:0: .* carries the prefix"):
        gkdjax.run(c, tmp_path / "run")
