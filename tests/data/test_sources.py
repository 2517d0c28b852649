"""Rows of files and of the config; every way in which they can be wrong."""

import json
import logging

import pytest

from gkdjax.data.sources import read_examples
from gkdjax.errors import UserError
from gkdjax.types import Example, Message

_ASKED = (Message("user", "hi"),)


def _write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def _turn(role="user", content="hi", **more):
    return {"role": role, "content": content, **more}


def test_rows_of_the_config_are_named_by_its_key():
    rows = (
        {"prompt": "hi"},
        {"prompt": "hi", "response": " yo ", "answer": "yo"},
        {"turns": [_turn()], "prefix_messages": [_turn("system", "s")]},
        {"messages": [_turn(), _turn("assistant", "yo")]},
        {"messages": [_turn(), _turn("assistant", "yo"), _turn("user", "so?")], "response": None},
    )
    assert read_examples(rows, "data.train") == [
        Example("data.train:0", 0, (), _ASKED, None, None),
        Example("data.train:1", 1, (), _ASKED, " yo ", "yo"),
        Example("data.train:2", 2, (Message("system", "s"),), _ASKED, None, None),
        Example("data.train:3", 3, (), _ASKED, "yo", None),
        Example(
            *("data.train:4", 4, ()),
            (*_ASKED, Message("assistant", "yo"), Message("user", "so?")),
            *(None, None),
        ),
    ]


def test_rows_of_files_are_named_by_line_or_index(tmp_path):
    rows = [{"prompt": "hi"}, {"prompt": "two\u2028lines", "answer": "é"}]
    line = "\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for source in (
        _write(tmp_path / "a.jsonl", "\n" + line + "\n\n"),
        _write(tmp_path / "b.jsonl", b"\xef\xbb\xbf\n" + line.encode()),
    ):
        first, second = read_examples(source, "data.train")
        assert (first.name[1:], first.row_id) == (".jsonl:2", 0)
        assert (second.name[1:], second.row_id) == (".jsonl:4", 1)
        assert second.turns[0].content == "two\u2028lines" and second.answer == "é"
    listed = read_examples(_write(tmp_path / "c.json", json.dumps(rows)), "data.train")
    assert [(e.name, e.row_id) for e in listed] == [("c.json:0", 0), ("c.json:1", 1)]


def test_other_columns_are_named_once(caplog):
    rows = ({"prompt": "hi", "id": 1}, {"messages": [_turn(weight=0)], "id": 2})
    with caplog.at_level(logging.INFO, "absl"):
        read_examples(rows, "data.train")
    assert [r.getMessage() for r in caplog.records] == [
        "data.train: columns that nothing reads: id, messages[].weight"
    ]
    caplog.clear()
    read_examples(({"prompt": "hi"},), "data.train")
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("x.csv", "a,b", r"data.train = .*x.csv: the name must end in .json or .jsonl"),
        ("x.jsonl", "", r"x.jsonl: the file is empty"),
        ("x.json", " \n", r"x.json: the file is empty"),
        ("x.json", "[]", r"data.train = .*x.json: holds no rows"),
        ("x.json", '{"prompt": "hi"}', r"x.json: must hold a list of rows, not an object"),
        ("x.json", '[\n{"prompt": }]', r"x.json: line 2, column 12: does not parse as JSON"),
        ("x.jsonl", '{"prompt": "a"}\n\n{"pro', r"x.jsonl: line 3, column 2: does not parse"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": NaN}', r"x.jsonl:2: NaN is not JSON"),
        ("x.json", '[{"prompt": "a", "id": -Infinity}]', r"x.json: -Infinity is not JSON"),
        ("x.jsonl", '{"prompt": "a"}\n[1]', r"x.jsonl:2: a row must be an object .*not a list"),
        ("x.jsonl", '\n{"response": "a"}', r"x.jsonl:2: has no turns; give it one of prompt"),
        ("x.json", '[{"prompt": "\\ud800"}]', r"x.json:0: prompt is no valid Unicode"),
        ("x.json", b'[{"prompt": "\xff"}]', r"data.train = .*x.json: is not UTF-8"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, text, expected):
    with pytest.raises(UserError, match=expected):
        read_examples(_write(tmp_path / name, text), "data.train")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data.train = .*no\.json: No such file"):
        read_examples(str(tmp_path / "no.json"), "data.train")
    (tmp_path / "dir.json").mkdir()
    with pytest.raises(UserError, match=r"data.train = .*dir\.json: Is a directory"):
        read_examples(str(tmp_path / "dir.json"), "data.train")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("hi", "a row must be an object with columns, not a string"),
        (None, "a row must be an object with columns, not null"),
        ({}, "has no turns; give it one of prompt, turns, messages"),
        ({"prompt": None}, "has no turns; give it one of"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": 3}, "prompt must be a string, not a number"),
        ({"prompt": True}, "prompt must be a string, not true or false"),
        ({"prompt": ["hi"]}, "prompt must be a string, not a list"),
        ({"prompt": "hi", "messages": [_turn()]}, "its turns, prompt or messages. Keep one"),
        ({"turns": []}, "has no turns: turns is an empty list"),
        ({"turns": {"role": "user"}}, "turns must be a list of messages, not an object"),
        ({"turns": ["hi"]}, r"turns\[0\]: must be .*, not a string"),
        ({"turns": [_turn(), {"role": "user"}]}, r"turns\[1\]: has no 'content'; there is"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\]: has no 'role'"),
        ({"messages": [_turn(role=1)]}, r"messages\[0\]: role must be a string, not a number"),
        ({"messages": [_turn(role="")]}, r"messages\[0\]: role is empty"),
        ({"messages": [_turn(content=None)]}, r"messages\[0\]: content must be a string, not null"),
        ({"messages": [_turn(content="")]}, r"messages\[0\]: content is empty"),
        ({"messages": [_turn("assistant")]}, "has no turns before the response"),
        (
            {"messages": [_turn(), _turn("assistant")], "response": "yo"},
            "which is the response, the column 'response' or the last message",
        ),
        ({"prompt": "hi", "response": ""}, "response is empty"),
        ({"prompt": "hi", "response": {}}, "response must be a string, not an object"),
        ({"prompt": "hi", "answer": 3.5}, "answer must be a string, not a number"),
        ({"prompt": "hi", "prefix_messages": "s"}, "prefix_messages must be a list of messages"),
        ({"prompt": "hi", "prefix_messages": [1]}, r"prefix_messages\[0\]: must be .* a number"),
    ],
)
def test_bad_rows_are_refused_by_name(row, expected):
    with pytest.raises(UserError, match="^data.train:1: .*" + expected):
        read_examples(({"prompt": "fine"}, row), "data.train")


def test_no_rows_in_the_config_is_refused():
    with pytest.raises(UserError, match=r"^data.train: holds no rows"):
        read_examples((), "data.train")
