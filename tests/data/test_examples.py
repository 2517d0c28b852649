"""Rows of files and of the config; every way in which they can be wrong."""

import itertools
import json
import logging

import pytest

from gkdjax.data.examples import BadRows, read_examples
from gkdjax.data.readers import LIST_NAMES
from gkdjax.types import Example, Expected, Message
from gkdjax.utils.errors import UserError

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
        {"prompt": "hi", "response": 7},
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
        Example("data.train:5", 5, (), _ASKED, Message("assistant", "7"), None),
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
        {"messages": [_turn(score=0, name=None)], "id": 1, "label": 3, "weight": 1, "images": []},
        {"messages": [_turn(**{"to\nol": "x"})], "id": None, "k\ud800": 0, "context": " "},
    )
    with caplog.at_level(logging.INFO, "absl"):
        read_examples(rows, "data.train")
    assert [r.getMessage() for r in caplog.records] == [
        "data.train: columns that nothing reads: 'k\\ud800', context, id, images, label,"
        " messages[].'to\\nol', messages[].score, weight"
    ]
    caplog.clear()
    read_examples(({"prompt": "hi"},), "data.train")
    assert not caplog.records
    assert read_examples(({"text": "hi", "label": 0},), "x")[0].turns == _ASKED  # a class, not "no"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("x.csv", "a,b", r"data.train = .*x.csv: its name must end in .json, .jsonl or .parquet"),
        ("x.jsonl", "", r"x.jsonl: the file is empty"),
        ("x.json", " \n", r"x.json: the file is empty"),
        ("x.json", "[]", r"data.train = .*x.json: holds no rows"),
        (
            "x.json",
            '{"prompt": "hi"}',
            r"x.json: must hold a list of rows, or .*; it has \['prompt'\]",
        ),
        (
            "x.json",
            json.dumps({f"row {i}": {} for i in range(9999)}),
            r"x.json: must hold a list of rows, or .{1,250}; it has .{60}\.\.\.$",
        ),
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
        ("x.json", '[{"prompt": ["a"]}]', r"x.json:0: prompt\[0\]: must be .*, not a string"),
        ("x.json", f'[\n{{"id": {"9" * 5000}}}]', r"x.json: line 2: has an integer of 5000 digits"),
        ("x.jsonl", f'{{"prompt": "a"}}\n{{"id": -{"9" * 5000}}}', r"x.jsonl: line 2: has an int"),
        ("x.jsonl", '{"a": ' + "[" * 10**5 + "]" * 10**5 + "}", r"x.jsonl:1: nests lists or obj"),
        ("x.json", '{"a":' * 10**5 + "1" + "}" * 10**5, r"x.json: nests lists or objects too"),
        ("x.jsonl", '{"prompt": "a"}\n\ufeff{"prompt": "b"}', r"x.jsonl: line 2, .* a byte order"),
        ("x.json", '{"prompt": "a"}\n{"prompt": "b"', r"x.json: line 2, column 15: does not par"),
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
        ({"question": "a", "input": "b"}, "its turns, input or question. Keep one"),
        ({"text": "a", "conversations": []}, "its turns, text or conversations. Keep one"),
        ({"prompt": 3}, "prompt must be a string, not a number"),
        ({"prompt": True}, "prompt must be a string, not true or false"),
        ({"prompt": ["hi"]}, r"prompt\[0\]: must be .*, not a string"),
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
            {"prompt": "hi", "response": [_turn(), _turn("assistant")]},
            "response begins with the question, .* as well; name it 'messages' if it is the",
        ),
        ({"prompt": "hi", "response": ["yo"]}, "response must be a string, not a list"),
        ({"instruction": "a", "text": "a yo", "output": "y"}, "its turns, instruction or text. Ke"),
        (
            {"instruction": "a", "text": "say a"},
            "its turns, instruction or text. .* remove 'text' if",
        ),
        *(
            (
                {"conversations": [{"from": who, "value": "{}"}]},
                f"'{who}': write the call as 'tool_c",
            )
            for who in ("function_call", "tool_call")
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
    asked = [{"from": "system", "value": "s"}, {"from": "human", "value": " hi\n"}]
    for row in (
        {"prompt": "hi ", "conversations": [*asked, {"from": "gpt", "value": "yo"}]},
        {"prompt": talk[:2], "messages": talk},
    ):
        (example,) = read_examples((row,), "data.train")
        assert (len(example.turns), example.given, example.response) == (2, 0, "yo")
    for row in (
        {"prompt": "ho", "messages": talk},
        {"prompt": [talk[1]], "messages": talk},
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


@pytest.mark.parametrize("form", [("role", "content"), ("from", "value")])
def test_roles_have_the_names_that_data_sets_use(form):
    def row(*said):
        return {"messages": [dict(zip(form, (who, who), strict=True)) for who in said]}

    names = {
        "user": ("user", "human", "Human", "USER", "prompter"),
        "assistant": ("assistant", "gpt", "Assistant", "model", "bot", "chatbot", "ChatGPT", "ai"),
    }
    for user, answer in itertools.product(names["user"], names["assistant"]):
        (example,) = read_examples((row("System", user, answer),), "data.train")
        assert [turn.role for turn in example.turns] == ["system", "user"]
        assert example.answer == Message("assistant", answer)
    (example,) = read_examples((row("developer", "human", "gpt", "Tool", "observation"),), "x")
    assert [turn.role for turn in example.turns[3:]] == ["tool", "observation"]
    told = rf"x:0: messages\[0\]: {form[0]} = 'narrator' is nobody known: it is one of user, human,"
    with pytest.raises(UserError, match=told):
        read_examples((row("narrator", "user"),), "x")
    roles = ("narrator", "gpt", "model")  # those that are known are what they are
    (example,) = read_examples((row("narrator", "gpt"),), "x", roles=roles)
    assert ([turn.role for turn in example.turns], example.response) == (["narrator"], "gpt")


_CALL = {"type": "function", "function": {"name": "add", "arguments": {"b": [1, None], "a": 2.5}}}


def test_messages_go_whole_to_the_template():
    said = [
        _turn(name="Ann", reasoning_content=""),
        {"role": "assistant", "content": None, "tool_calls": [_CALL], "reasoning_content": "so"},
        _turn("tool", "", tool_call_id="c1"),
        _turn("assistant", "3.5", thinking="t", tool_calls=[], reasoning=" r "),
    ]
    (example,) = read_examples(({"messages": said, "tools": [_CALL]},), "x")
    told = [message.for_template() for message in (*example.turns, example.answer)]
    assert told == [
        _turn(name="Ann"),
        _turn("assistant", "", tool_calls=[_CALL], reasoning_content="so"),
        _turn("tool", "", tool_call_id="c1"),
        _turn("assistant", "3.5", thinking="t", reasoning=" r "),
    ]
    # The order of keys is the template's to write, but for those of the message itself.
    assert list(told[1]["tool_calls"][0]["function"]["arguments"]) == ["b", "a"]
    assert example.turns[1].fields.startswith('{"reasoning_content":"so","tool_calls":[{"type":')
    assert json.loads(example.tools) == [_CALL] and ", " not in example.tools
    said[1] |= {"tool_calls": json.dumps([_CALL])}
    said[3] |= {"tool_calls": "null"}
    (again,) = read_examples(({"messages": said, "tools": json.dumps([_CALL])},), "x")
    assert again == example
    for nothing in ("[]", "null", " "):
        (none,) = read_examples(({"messages": said, "tools": nothing},), "x")
        assert none.tools == ""


@pytest.mark.parametrize(
    ("more", "learnt"),
    [
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"trainable": False}, False),
        ({"train": False, "weight": 1}, False),
        ({"loss": False}, False),
        ({"weight": 1.0, "train": True, "trainable": None, "masked": False, "mask": 0}, True),
    ],
)
def test_a_message_may_say_that_it_is_not_learnt(more, learnt):
    talk = [_turn(), _turn("assistant", "yo", **more)]
    (example,) = read_examples(({"messages": [*talk, *talk]},), "x")
    assert (example.turns[1].learn, example.answer.learn) == (learnt, learnt)
    assert example.turns[1].fields == ""


_PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i", "image_url": None}]


@pytest.mark.parametrize(
    ("row", "turns", "given", "answer"),
    [
        ({"system": "s", "prompt": "hi", "output": "yo"}, "s hi", 0, "yo"),
        ({"system_prompt": "s", "conversations": [_turn()]}, "s hi", 0, None),
        ({"system": "s", "messages": [_turn("system", "s"), _turn()]}, "s hi", 0, None),
        ({"system": " ", "prompt": "hi"}, "hi", 0, None),
        ({"instruction": "a", "input": "b", "output": "yo"}, "a\n\nb", 0, "yo"),
        ({"instruction": "a", "input": " ", "output": "yo"}, "a", 0, "yo"),
        (
            {"instruction": "a", "input": "b", "output": "yo", "text": "Do a:\nIn: b\nOut: yo\n"},
            *("a\n\nb", 0, "yo"),
        ),
        ({"messages": [_turn(), _turn("gpt", "so: 4")], "answer": "4"}, "hi", 0, "so: 4"),
        ({"messages": [_turn("system", ""), _turn(), _turn("gpt", "yo")]}, "hi", 0, "yo"),
        ({"prompt": [_turn()], "response": [_turn("assistant", "yo")]}, "hi", 1, "yo"),
        ({"messages": [_turn(content=_PARTS)]}, "hi", 0, None),
        ({"prompt": [_turn(), _turn("assistant", "a"), _turn(content="b")]}, "hi a b", 3, None),
        ({"prompt": [_turn()], "completion": [_turn("assistant", "yo")]}, "hi", 1, "yo"),
        ({"prompt": "hi", "completion": [_turn("assistant", "yo")]}, "hi", 1, "yo"),
        (
            {
                "system": "s",
                "prompt": [_turn()],
                "completion": [_turn("assistant", "a"), _turn(content="b"), _turn("gpt", "yo")],
            },
            *("s hi a b", 2, "yo"),
        ),
        ({"messages": [_turn(), _turn("gpt", "yo")], "chosen": 1, "rejected": None}, None, 0, None),
    ],
)
def test_columns_and_lists_with_one_clear_meaning(row, turns, given, answer):
    if turns is None:
        row |= {"chosen": row["messages"], "rejected": [_turn(content="no")]}
        turns, answer = "hi", "yo"  # the chosen one is what is learnt anyway
    (example,) = read_examples((row,), "x")
    assert " ".join(turn.content for turn in example.turns) == turns
    assert (example.given, example.response) == (given, answer)
    assert not turns.startswith("s ") or example.turns[0].role == "system"


def _deep(levels):
    return {"a": _deep(levels - 1)} if levels else 1


@pytest.mark.parametrize(
    ("row", "told"),
    [
        *(
            ({"prompt": "hi", column: value}, f"has '{column}', which nothing reads: ")
            for column, value in {
                **{name: ["a"] for name in ("context", "documents", "choices", "history")},
                **dict.fromkeys(("chosen", "rejected", "reasoning_content", "functions"), "a"),
                **dict.fromkeys(("role", "reasoning", "rationale"), "a"),
                **{"images": ["a"], "audio": {"path": "a"}, "loss_mask": 0, "label": False},
                **{"weight": 0.5},
            }.items()
        ),
        *(
            ({"messages": [_turn(**{field: "a"})]}, rf"messages\[0\]: has '{field}', which nothi")
            for field in ("function_call", "images", "tools", "thought", "loss_mask", "mask")
        ),
        *(
            ({"prompt": "hi", "completion": "yo", "label": label}, "has 'label', which nothing rea")
            for label in (0, "False", "0")
        ),
        ({"messages": [_turn(masked=True)]}, r"messages\[0\]: has 'masked', which nothing reads"),
        ({"messages": [_turn(weight=0.5)]}, r"messages\[0\]: weight = 0.5: it is 1 or 0"),
        ({"messages": [_turn(train="no")]}, r"messages\[0\]: train = 'no': it is 1 or 0"),
        ({"messages": [_turn(train="n" * 9999)]}, r"train = 'n{59}\.\.\.: it is 1 or 0"),
        ({"messages": [_turn("n" * 9999)]}, r"role = 'n{59}\.\.\. is nobody known"),
        ({"messages": [_turn(tool_calls={"f": 1})]}, r"tool_calls must be a list of objects"),
        (
            {"messages": [_turn(tool_calls="f()")]},
            r"tool_calls is text that does not parse as JSON",
        ),
        ({"messages": [_turn("gpt", "", tool_calls=[{"a": 1e999}])]}, r"tool_calls\[0\].a is inf"),
        ({"messages": [_turn(tool_calls=[{"a\ud800": 1}])]}, "a key is no valid Unicode"),
        ({"messages": [_turn(tool_calls=[{"a": "\0"}])]}, r"tool_calls\[0\].a has a NUL"),
        ({"messages": [_turn(tool_calls=[_deep(800)])]}, "nests deeper than 64 levels"),
        ({"messages": [_turn(reasoning_content=3)]}, "reasoning_content must be a string, not a n"),
        ({"messages": [_turn(content=[])]}, r"messages\[0\]: content is empty"),
        ({"messages": [_turn(content=["a"])]}, r"content\[0\]: must be {'type': 'text', .* string"),
        (
            {"messages": [_turn(content=[{"type": "image"}])]},
            r"content\[0\]: only {'type': 'text', 'text': ...} is read, not type 'image'",
        ),
        ({"prompt": "hi", "tools": "f"}, "tools is text that does not parse as JSON"),
        ({"prompt": "hi", "tools": {}}, "tools must be a list of tools, not an object"),
        ({"prompt": "hi", "tools": ["f"]}, r"tools\[0\]: a tool is an object, not a string"),
        ({"prompt": "hi", "system": "a", "system_prompt": "b"}, "which is the system message, sys"),
        (
            {"system": "a", "messages": [_turn("system", "b"), _turn()]},
            "which is the system message, the column 'system' or the first of the turns",
        ),
        ({"prompt": [_turn(), _turn("gpt")]}, "prompt ends with the assistant's message"),
        ({"prompt": [_turn()], "completion": [_turn()]}, "completion has to end with the assist"),
        ({"prompt": [_turn()], "completion": []}, "completion has to end with the assist"),
    ],
)
def test_what_would_change_what_is_learnt_is_refused_by_name(row, told):
    with pytest.raises(UserError, match=rf"^x:0: .*{told}"):
        read_examples((row,), "x")


def test_bad_rows_are_told_all_at_once_or_dropped_and_named(caplog):
    rows = [{"prompt": f"ask {i}", "response": "yo"} for i in range(9)]
    for i in (1, 4, 5, 6, 7):
        rows[i]["response"] = ""
    rows[2]["prompt"] = 3
    with pytest.raises(UserError) as caught:
        read_examples(tuple(rows), "data.train")
    assert str(caught.value) == (
        "data.train: 6 rows cannot be used; data.bad_rows='drop' would leave such rows out:"
        " data.train:1: response is empty (and 4 more: data.train:4, data.train:5, data.train:6,"
        " ...); data.train:2: prompt must be a string, not a number"
    )
    bad_rows = BadRows("drop")
    with caplog.at_level(logging.INFO, "absl"):
        examples = read_examples(tuple(rows), "data.train", bad_rows=bad_rows)
    assert [(e.name, e.row_id) for e in examples] == [(f"data.train:{i}", i) for i in (0, 3, 8)]
    assert bad_rows.dropped == {"data.train": [f"data.train:{i}" for i in (1, 2, 4, 5, 6, 7)]}
    assert "6 rows dropped (data.bad_rows): data.train:1: response is empty" in caplog.text
    with pytest.raises(UserError, match=r"no row is left of 1, all were dropped: data"):
        read_examples((rows[1],), "data.train", bad_rows=bad_rows)


def test_jsonl_may_be_called_json(tmp_path):
    rows = "\n\n".join(json.dumps({"prompt": f"ask {i}"}) for i in range(2))
    examples = read_examples(_write(tmp_path / "x.json", rows), "data.train")
    assert [e.name for e in examples] == ["x.json:1", "x.json:3"]


def test_what_is_much_too_long_for_a_path_is_told(tmp_path):
    for source in (json.dumps([{"prompt": "a" * 999}]), "x\0.jsonl"):
        with pytest.raises(UserError, match=r"^'?data\.train = .{1,400}: "):
            read_examples(source, "data.train")


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
        {"question": "hi", column: [4, 4.5, -1e22], "choices": []},
        {"question": "hi", column: 0},
    )
    examples = read_examples(rows, "eval.questions", match="keywords")
    assert [e.expected for e in examples] == [
        Expected("keywords", ("yo",)),
        Expected("exact", ("yo", "hey")),
        Expected("regex", ("^y",)),
        None,
        Expected("keywords", ("4", "4.5", "-1e+22")),
        Expected("keywords", ("0",)),
    ]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"answer": "a", "target": "b"}, "which is the answer, answer or target"),
        ({"answer": []}, "answer is an empty list; name at least one"),
        ({"answer": ["a", True]}, "answer must be a string, not true or false"),
        ({"answer": float("inf")}, "answer is inf, which is no number in JSON"),
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
