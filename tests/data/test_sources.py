"""Rows of files and of the config; every way in which they can be wrong."""

import json
import logging

import pytest

from gkdjax.data.files import LIST_NAMES
from gkdjax.data.sources import read_examples
from gkdjax.errors import UserError
from gkdjax.types import Example, Expected, Message

_ASKED = (Message("user", "hi"),)


def _write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def _turn(role="user", content="hi", **more):
    return {"role": role, "content": content, **more}


def test_rows_of_the_config_are_named_by_its_key():
    rows = (
        {"prompt": "hi"},
        {"prompt": "hi", "response": " yo "},
        {"turns": [_turn()], "prefix_messages": [_turn("system", "s")]},
        {"messages": [_turn(), _turn("assistant", "yo")]},
        {"messages": [_turn(), _turn("assistant", "yo"), _turn("user", "so?")], "response": None},
    )
    assert read_examples(rows, "data.train") == [
        Example("data.train:0", 0, (), _ASKED, None, None),
        Example("data.train:1", 1, (), _ASKED, Message("assistant", " yo "), None),
        Example("data.train:2", 2, (Message("system", "s"),), _ASKED, None, None),
        Example("data.train:3", 3, (), _ASKED, Message("assistant", "yo"), None),
        Example(
            *("data.train:4", 4, ()),
            (*_ASKED, Message("assistant", "yo"), Message("user", "so?")),
            *(None, None),
        ),
    ]


def test_rows_of_files_are_named_by_line_or_index(tmp_path):
    rows = [{"prompt": "hi"}, {"prompt": "two\u2028lines", "response": "é"}]
    line = "\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for source in (
        _write(tmp_path / "a.jsonl", "\n" + line + "\n\n"),
        _write(tmp_path / "b.jsonl", b"\xef\xbb\xbf\n" + line.encode()),
    ):
        first, second = read_examples(source, "data.train")
        assert (first.name[1:], first.row_id) == (".jsonl:2", 0)
        assert (second.name[1:], second.row_id) == (".jsonl:4", 1)
        assert second.turns[0].content == "two\u2028lines" and second.response == "é"
    listed = read_examples(_write(tmp_path / "c.json", json.dumps(rows)), "data.train")
    assert [(e.name, e.row_id) for e in listed] == [("c.json:0", 0), ("c.json:1", 1)]


def test_other_columns_are_named_once(caplog):
    rows = (
        {"messages": [_turn(weight=0, name=None)], "id": 1},
        {"messages": [_turn(tool="x")], "id": None},
    )
    with caplog.at_level(logging.INFO, "absl"):
        read_examples(rows, "data.train")
    assert [r.getMessage() for r in caplog.records] == [
        "data.train: columns that nothing reads: id, messages[].tool, messages[].weight"
    ]
    caplog.clear()
    read_examples(({"prompt": "hi"},), "data.train")
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("x.csv", "a,b", r"data.train = .*x.csv: its name must end in .json, .jsonl or .parquet"),
        ("x.jsonl", "", r"x.jsonl: the file is empty"),
        ("x.json", " \n", r"x.json: the file is empty"),
        ("x.json", "[]", r"data.train = .*x.json: holds no rows"),
        ("x.json", '{"prompt": "hi"}', r"x.json: must hold a list of rows, or .*; it has 'prompt'"),
        ("x.json", "{}", r"x.json: must hold a list of rows, or .*; it has nothing"),
        ("x.json", '"hi"', r"x.json: must hold a list of rows, not a string"),
        ("x.json", '{"data": {"a": 1}}', r"x.json: data must be a list of rows, not an object"),
        ("x.json", '{"data": [], "pairs": []}', r"x.json: which are its rows, pairs or data\?"),
        ("x.json", '[{"prompt": "a", "prompt": "b"}]', r"x.json: an object has 'prompt' twice"),
        ("x.json", '[\n{"prompt": }]', r"x.json: line 2, column 12: does not parse as JSON"),
        ("x.jsonl", '{"prompt": "a"}\n\n{"pro', r"x.jsonl: line 3, column 2: does not parse"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": NaN}', r"x.jsonl:2: NaN is not JSON"),
        ("x.json", '[{"prompt": "a", "id": -Infinity}]', r"x.json: -Infinity is not JSON"),
        ("x.jsonl", '{"prompt": "a"}\n[1]', r"x.jsonl:2: a row must be an object .*not a list"),
        ("x.jsonl", '\n{"response": "a"}', r"x.jsonl:2: has no turns; give it one of prompt"),
        ("x.json", '[{"prompt": "\\ud800"}]', r"x.json:0: prompt is no valid Unicode"),
        (
            "x.json",
            b'\n[{"prompt": "\xff"}]',
            r"data.train = .*x.json: is not UTF-8: line 2 .*0xff",
        ),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": "b\\u0000"}', r"x.jsonl:2: prompt has a NUL at"),
        ("x.jsonl", '{"prompt": "a", "response": " "}', r"x.jsonl:1: response is nothing but whi"),
        ("x.json", '[{"prompt": ["a"]}]', r"x.json:0: prompt must be a string, not a list"),
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
        ({}, "has no turns; give it one of prompt, user_message, .*text, messages, turns, conv"),
        ({"prompt": None}, "has no turns; give it one of"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is nothing but white space"),
        ({"prompt": "a\ud83d"}, "prompt is no valid Unicode: .*'.ud83d', at character 1"),
        ({"prompt": "a\0"}, "prompt has a NUL at character 1"),
        ({"instruction": "a", "input": ""}, "its turns, input or instruction. Keep one"),
        ({"text": "a", "conversations": []}, "its turns, text or conversations. Keep one"),
        ({"prompt": 3}, "prompt must be a string, not a number"),
        ({"prompt": True}, "prompt must be a string, not true or false"),
        ({"prompt": ["hi"]}, "prompt must be a string, not a list"),
        ({"prompt": "ho", "messages": [_turn()]}, "its turns, prompt or messages. Keep one"),
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
        ({"prompt": "hi", "target": "\t"}, "target is nothing but white space"),
        ({"prompt": "hi", "response": "\ufeff"}, "response is nothing but white space"),
        ({"prompt": "hi", "response": "a\udc80"}, "response is no valid Unicode: .*at character 1"),
        ({"prompt": "hi", "answer": "\0"}, "answer has a NUL at character 0"),
        (
            {"messages": [_turn(), _turn("assistant", " \r\n")]},
            r"messages\[1\]: content is nothing but white space",
        ),
        (
            {"conversations": [{"from": "human", "value": "a\ud800"}]},
            r"conversations\[0\]: value is no valid Unicode",
        ),
        (
            {"prompt": "hi", "prefix_messages": [_turn("system", "\0")]},
            r"prefix_messages\[0\]: content has a NUL at character 0",
        ),
        ({"prompt": "hi", "output": "a", "target": "a"}, "the response, output or target. Keep"),
        ({"prompt": "hi", "response": "a", "answer": "a"}, "the response, response or answer. Ke"),
        (
            {"messages": [_turn(), _turn("assistant")], "answer": "yo"},
            "which is the response, the column 'answer' or the last message",
        ),
        ({"turns": [_turn(value="a")]}, r"turns\[0\]: has 'role' and 'content' and 'value'; keep"),
        ({"turns": [{"from": "human"}]}, r"turns\[0\]: has no 'value'; there is \['from'\]"),
        ({"turns": [{"from": "bing", "value": "a"}]}, r"turns\[0\]: from = 'bing' is nobody"),
        ({"turns": [{"from": "gpt", "value": ""}]}, r"turns\[0\]: value is empty"),
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


@pytest.mark.parametrize(
    "column", ["prompt", "user_message", "input", "question", "instruction", "text"]
)
def test_a_prompt_has_many_names(column):
    (example,) = read_examples(({column: "hi"},), "data.train")
    assert example == Example("data.train:0", 0, (), _ASKED, None, None)


@pytest.mark.parametrize("column", ["response", "completion", "output", "answer", "target"])
def test_a_response_has_many_names(column):
    (example,) = read_examples(({"prompt": "hi", column: "yo"},), "data.train")
    assert example == Example("data.train:0", 0, (), _ASKED, Message("assistant", "yo"), None)


def test_a_prompt_that_only_repeats_how_the_conversation_begins_is_no_question():
    talk = [_turn("system", "s"), _turn(), _turn("assistant", "yo")]
    (example,) = read_examples(({"prompt": "hi", "messages": talk},), "data.train")
    assert (example.turns, example.response) == ((Message("system", "s"), *_ASKED), "yo")
    for row in (
        {"prompt": "ho", "messages": talk},
        {"prompt": "s", "messages": talk},
        {"prompt": "hi", "messages": talk, "turns": talk},
        {"prompt": "hi", "messages": "hi"},
        {"prompt": "hi", "messages": []},
    ):
        with pytest.raises(UserError, match=r"^data\.train:0: which are its turns, prompt or mess"):
            read_examples((row,), "data.train")


@pytest.mark.parametrize("column", ["messages", "turns", "conversations"])
def test_a_conversation_has_many_names_and_two_forms(column):
    ours = [_turn("system", "s"), _turn(), _turn("assistant", "yo"), _turn("user", "so?")]
    speakers = ("system", "human", "gpt", "user")
    theirs = [
        {"from": speaker, "value": turn["content"], "role": None}
        for speaker, turn in zip(speakers, ours, strict=True)
    ]
    first, second = read_examples(({column: ours}, {column: theirs}), "data.train")
    assert first.turns == second.turns == tuple(Message(**turn) for turn in ours)
    assert first.response is second.response is None


def test_an_answer_is_what_is_expected_in_questions_and_a_response_in_training():
    row = {"question": "hi", "answer": "yo"}
    assert read_examples((row,), "eval.questions", match="exact") == [
        Example("eval.questions:0", 0, (), _ASKED, None, Expected("exact", ("yo",)))
    ]
    both = row | {"response": "well, yo"}
    (example,) = read_examples((both,), "eval.questions", match="exact")
    assert (example.response, example.expected.any_of) == ("well, yo", ("yo",))


@pytest.mark.parametrize("column", ["answer", "expected", "target"])
def test_questions_take_one_answer_or_several_and_a_row_may_say_how_it_is_looked_at(column):
    rows = (
        {"question": "hi", column: "yo"},
        {"question": "hi", column: ["yo", "hey"], "match": "exact"},
        {"question": "hi", column: "^y", "match": "regex"},
        {"question": "hi", column: None, "match": None, "output": "yo"},
    )
    examples = read_examples(rows, "eval.questions", match="keywords")
    assert [e.expected for e in examples] == [
        Expected("keywords", ("yo",)),
        Expected("exact", ("yo", "hey")),
        Expected("regex", ("^y",)),
        None,
    ]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"answer": "a", "target": "b"}, "which is the answer, answer or target"),
        ({"answer": []}, "answer is an empty list; name at least one"),
        ({"answer": ["a", 3]}, "answer must be a string, not a number"),
        ({"expected": " "}, "expected is nothing but white space"),
        ({"answer": "a", "match": "fuzzy"}, "match = 'fuzzy': it is one of keywords, exact, regex"),
        ({"answer": "(", "match": "regex"}, r"answer: '\(' is no regular expression: missing \)"),
        ({"answer": "a", "output": "b", "response": "c"}, "which is the response, response or out"),
    ],
)
def test_answers_that_cannot_be_meant_are_refused(row, told):
    with pytest.raises(UserError, match=rf"^eval\.questions:0: {told}"):
        read_examples(({"question": "hi", **row},), "eval.questions", match="exact")


def test_line_breaks_emoji_and_white_space_at_the_ends_stay_as_they_are():
    said = " a\r\nb \N{PARTY POPPER}\N{ZERO WIDTH JOINER} \n"
    (example,) = read_examples(({"prompt": said, "response": said},), "data.train")
    assert (example.turns[0].content, example.response) == (said, said)


def test_rows_of_several_kinds_are_counted_and_an_empty_prefix_is_none(caplog):
    rows = (
        {"prompt": "hi"},
        {"prompt": "hi", "answer": "yo", "prefix_messages": []},
        {"messages": [_turn(), _turn("assistant", "yo")]},
        {"prompt": "hi", "answer": None},
    )
    with caplog.at_level(logging.INFO, "absl"):
        examples = read_examples(rows, "data.train")
    assert [e.response for e in examples] == [None, "yo", "yo", None]
    assert {e.prefix for e in examples} == {()}
    assert [r.getMessage() for r in caplog.records] == [
        "data.train: 3 kinds of rows: 2 of prompt; 1 of prompt, answer, prefix_messages; "
        "1 of messages (the last message is the response)"
    ]


@pytest.mark.parametrize("name", LIST_NAMES)
def test_rows_may_stand_in_an_object_under_a_known_name(tmp_path, name):
    held = {"version": 3, name: [{"prompt": "hi"}, {"prompt": "hi"}]}
    examples = read_examples(_write(tmp_path / "x.json", json.dumps(held)), "data.train")
    assert [(e.name, e.turns) for e in examples] == [("x.json:0", _ASKED), ("x.json:1", _ASKED)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x.jsonl:train", r"data.train = .*x.jsonl:train: a file has no splits"),
        ("no/such/place", r"data.train = .*place: No such file or directory, and a hub id would"),
        ("no/such/place.csv", r"data.train = .*place.csv: No such file or directory, and"),
        ("no:a:b:c", r"data.train = .*no:a:b:c: write a dataset as NAME, NAME:SPLIT or"),
        ("no:", r"data.train = .*no:: write a dataset as NAME, NAME:SPLIT or"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, source, expected):
    _write(tmp_path / "x.jsonl", '{"prompt": "hi"}')
    with pytest.raises(UserError, match=expected):
        read_examples(str(tmp_path / source), "data.train")
