"""Rows of files and of the config; every way in which they can be wrong."""

import itertools
import json

import pytest

from gkdjax.data.examples import BadRows, read_examples
from gkdjax.data.readers import LIST_NAMES
from gkdjax.types import Example, Expected, Message
from gkdjax.utils.errors import UserError

_ASK = (Message("user", "hi"),)
_YO = Message("assistant", "yo")


def _write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return str(path)


def _turn(role="user", content="hi", **more):
    return {"role": role, "content": content, **more}


def _one(row, **how) -> Example:
    (example,) = read_examples((row,), "x", **how)
    return example


_HI, _ANSWER = _turn(), _turn("assistant", "yo")
_DEEP = "[" * 10**5 + "]" * 10**5


def _nested(levels):
    return {"a": _nested(levels - 1)} if levels else 1


def test_rows_of_the_config_are_named_by_its_key():
    system = _turn("system", "s")
    rows = ({"turns": [_HI], "prefix_messages": [system]}, {"messages": [_HI, _ANSWER, _HI]})
    assert read_examples(rows, "data.train") == [
        Example("data.train:0", 0, (Message("system", "s"),), _ASK, None, None),
        Example("data.train:1", 1, (), (*_ASK, _YO, *_ASK), None, None),
    ]
    with pytest.raises(UserError, match=r"^data.train: holds no rows"):
        read_examples((), "data.train")


def test_rows_of_files_are_named_by_line_or_index(tmp_path):
    rows = [{"prompt": "hi"}, {"prompt": "two\u2028lines", "response": "é"}]
    lines = "\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for name, text, places in (
        ("a.jsonl", "\n" + lines + "\n\n", (2, 4)),
        ("b.jsonl", b"\xef\xbb\xbf\n" + lines.encode(), (2, 4)),
        ("c.json", json.dumps(rows), (0, 1)),
        ("d.json", lines, (1, 3)),  # jsonl by another name
        *((f"{held}.json", json.dumps({"version": 3, held: rows}), (0, 1)) for held in LIST_NAMES),
    ):
        found = read_examples(_write(tmp_path / name, text), "data.train")
        names = [(f"{name}:{place}", i) for i, place in enumerate(places)]
        assert [(e.name, e.row_id) for e in found] == names
        assert [e.turns[0].content for e in found] == ["hi", "two\u2028lines"]
        assert [e.response for e in found] == [None, "é"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("x.csv", "a,b", r"x.csv: its name must end in .json, .jsonl or .parquet"),
        ("x.jsonl", "", r"x.jsonl: the file is empty"),
        ("x.json", " \n", r"x.json: the file is empty"),
        ("x.json", "[]", r"data.train = .*x.json: holds no rows"),
        ("x.json", '{"prompt": "hi"}', r"x.json: must hold a list .*; it has \['prompt'\]"),
        (
            *("x.json", json.dumps({f"row {i}": {} for i in range(9999)})),
            r"x.json: must hold a list of rows, or .{1,250}; it has .{60}\.\.\.$",
        ),
        ("x.json", "{}", r"x.json: must hold a list of rows, or .*; it has nothing"),
        ("x.json", '"hi"', r"x.json: must hold a list of rows, not a string"),
        ("x.json", '{"data": {"a": 1}}', r"x.json: data must be a list of rows, not an object"),
        ("x.json", '{"data": [], "pairs": []}', r"x.json: which are its rows, pairs or data\?"),
        ("x.json", '[{"prompt": "a", "prompt": "b"}]', r"x.json: an object has 'prompt' twice"),
        ("x.json", '[\n{"prompt": }]', r"x.json: line 2, column 12: does not parse as JSON"),
        ("x.json", '{"prompt": "a"}\n{"prompt": "b"', r"x.json: line 2, column 15: does not par"),
        ("x.jsonl", '{"prompt": "a"}\n\n{"pro', r"x.jsonl: line 3, column 2: does not parse"),
        ("x.jsonl", '{"prompt": "a"}\n\ufeff{"prompt": "b"}', r"x.jsonl: line 2, .* a byte order"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": NaN}', r"x.jsonl:2: NaN is not JSON"),
        ("x.json", '[{"prompt": "a", "id": -Infinity}]', r"x.json: -Infinity is not JSON"),
        ("x.jsonl", '{"prompt": "a"}\n[1]', r"x.jsonl:2: a row must be an object .*not a list"),
        ("x.jsonl", '\n{"response": "a"}', r"x.jsonl:2: has no turns; give it one of prompt"),
        ("x.json", b'\n[{"prompt": "\xff"}]', r"data.train = .*: is not UTF-8: line 2 .*0xff"),
        ("x.json", f'[\n{{"id": {"9" * 5000}}}]', r"x.json: line 2: has an integer of 5000 digits"),
        ("x.jsonl", f'{{"prompt": "a"}}\n{{"id": -{"9" * 5000}}}', r"x.jsonl: line 2: has an int"),
        ("x.jsonl", f'{{"a": {_DEEP}}}', r"x.jsonl:1: nests lists or objects"),
        ("x.json", f'{{"a": {_DEEP}}}', r"x.json: nests lists or objects too"),
        ("x.jsonl:train", None, r"data.train = .*x.jsonl:train: a file has no splits"),
        ("no/such/place", None, r"place: No such file or directory, and a hub id would"),
        ("no/such/place.csv", None, r"place.csv: No such file or directory, and"),
        ("no:a:b:c", None, r"data.train = .*no:a:b:c: write a dataset as NAME, NAME:SPLIT or"),
        ("no:", None, r"data.train = .*no:: write a dataset as NAME, NAME:SPLIT or"),
        ("no.json", None, r"data.train = .*no\.json: No such file"),
        ("dir.json", None, r"data.train = .*dir\.json: Is a directory"),
        ("a" * 9999 + ".jsonl", None, r"^data\.train = .{1,400}: File name too long"),
        ("x\0.jsonl", None, r"^'data\.train = .{1,400}: is no path"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(tmp_path, name, text, expected):
    (tmp_path / "dir.json").mkdir()
    _write(tmp_path / "x.jsonl", '{"prompt": "hi"}')
    if text is not None:
        _write(tmp_path / name, text)
    with pytest.raises(UserError, match=expected):
        read_examples(str(tmp_path / name), "data.train")


_NO_TEXT = [  # values that are no text of a prompt, a response or a message
    ("", "is empty"),
    (" \n", "is nothing but white space"),
    ("\ufeff", "is nothing but white space"),
    ("a\ud83d", "is no valid Unicode: .*'.ud83d', at character 1"),
    ("a\udc80", "is no valid Unicode: .*at character 1"),
    ("a\0", "has a NUL at character 1"),
    (True, "must be a string, not true or false"),
    (3.5, "must be a string, not a number"),
    ({}, "must be a string, not an object"),
]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("hi", "a row must be an object with columns, not a string"),
        (None, "a row must be an object with columns, not null"),
        ({}, "has no turns; give it one of prompt, user_message, .*text, messages, turns, conv"),
        ({"prompt": None}, "has no turns; give it one of"),
        *(({"prompt": value}, f"prompt {told}") for value, told in _NO_TEXT),
        *(({"prompt": "hi", "target": value}, f"target {told}") for value, told in _NO_TEXT),
        *(({"turns": [_turn(content=v)]}, rf"turns\[0\]: content {told}") for v, told in _NO_TEXT),
        ({"prompt": "hi", "response": ["yo"]}, "response must be a string, not a list"),
        ({"question": "a", "input": "b"}, "its turns, input or question. Keep one"),
        ({"text": "a", "conversations": []}, "its turns, text or conversations. Keep one"),
        ({"prompt": ["hi"]}, r"prompt\[0\]: must be .*, not a string"),
        ({"turns": []}, "has no turns: turns is an empty list"),
        ({"turns": {"role": "user"}}, "turns must be a list of messages, not an object"),
        ({"turns": ["hi"]}, r"turns\[0\]: must be .*, not a string"),
        ({"turns": [_HI, {"role": "user"}]}, r"turns\[1\]: has no 'content'; there is"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\]: has no 'role'"),
        ({"messages": [_turn(role=1)]}, r"messages\[0\]: role must be a string, not a number"),
        ({"messages": [_turn(role="")]}, r"messages\[0\]: role is empty"),
        ({"messages": [_turn(content=None)]}, r"messages\[0\]: content must be a string, not null"),
        ({"messages": [_ANSWER]}, "has no turns before the response"),
        ({"messages": [_HI, _ANSWER], "output": "a"}, "response, the column 'output' or the last"),
        ({"conversations": [{"from": "human", "value": ""}]}, r"conversations\[0\]: value is empt"),
        ({"prompt": "hi", "prefix_messages": [_turn("user", "\0")]}, r"messages\[0\]: content has"),
        ({"prompt": "hi", "prefix_messages": "s"}, "prefix_messages must be a list of messages"),
        ({"prompt": "hi", "prefix_messages": [1]}, r"prefix_messages\[0\]: must be .* a number"),
        ({"prompt": "hi", "output": "a", "target": "a"}, "the response, output or target. Keep"),
        ({"prompt": "hi", "response": "a", "answer": "a"}, "the response, response or answer. Ke"),
        ({"prompt": "hi", "response": [_HI, _ANSWER]}, "begins with the question, .* as well; if"),
        ({"instruction": "a", "text": "a yo", "output": "y"}, "its turns, instruction or text. Re"),
        ({"instruction": "a", "text": "say a"}, "instruction or text. Remove 'text' if"),
        ({"turns": [_turn("function_call")]}, "'function_call': write the call as 'tool_c"),
        ({"turns": [_turn("tool_call")]}, "'tool_call': write the call as 'tool_c"),
        ({"turns": [_turn(value="a")]}, r"turns\[0\]: has 'role' and 'content' and 'value'; keep"),
        ({"turns": [{"from": "human"}]}, r"turns\[0\]: has no 'value'; there is \['from'\]"),
        ({"turns": [{"from": "bing", "value": "a"}]}, r"turns\[0\]: from = 'bing' is nobody"),
        ({"prompt": "ho", "messages": [_HI]}, "its turns, prompt or messages. Keep one"),
        ({"prompt": [_HI], "messages": [_turn("user", "s"), _HI]}, "its turns, prompt or messages"),
        ({"prompt": "hi", "messages": [_HI], "turns": [_HI]}, "turns, prompt or messages or turns"),
        ({"prompt": "hi", "messages": "hi"}, "its turns, prompt or messages. Keep one"),
        ({"prompt": "hi", "messages": []}, "its turns, prompt or messages. Keep one"),
        *(
            ({"prompt": "hi", column: ["a"]}, f"has '{column}', which nothing reads: ")
            for column in (
                *("context", "documents", "choices", "history", "images", "reasoning", "rationale"),
                *("role", "chosen", "rejected", "reasoning_content", "functions"),
            )
        ),
        ({"prompt": "hi", "audio": {"path": "a"}}, "has 'audio', which nothing reads: only text"),
        ({"prompt": "hi", "loss_mask": 0}, "has 'loss_mask', which nothing reads: write a mess"),
        ({"prompt": "hi", "weight": 0.5}, "has 'weight', which nothing reads: rows count alike"),
        ({"prompt": "hi", "label": False}, "has 'label', which nothing reads: answers"),
        *(
            ({"prompt": "hi", "completion": "yo", "label": label}, "has 'label', which nothing")
            for label in (0, "False", "0")
        ),
        *(
            ({"messages": [_turn(**{field: "a"})]}, rf"messages\[0\]: has '{field}', which nothi")
            for field in ("function_call", "images", "tools", "thought", "loss_mask", "mask")
        ),
        ({"messages": [_turn(masked=True)]}, r"messages\[0\]: has 'masked', which nothing reads"),
        ({"messages": [_turn(weight=0.5)]}, r"messages\[0\]: weight = 0.5: it is 1 or 0"),
        ({"messages": [_turn(train="n" * 9999)]}, r"train = 'n{59}\.\.\.: it is 1 or 0"),
        ({"messages": [_turn("n" * 9999)]}, r"role = 'n{59}\.\.\. is nobody known"),
        ({"messages": [_turn(tool_calls={"f": 1})]}, r"tool_calls must be a list of objects"),
        ({"messages": [_turn(tool_calls="f()")]}, r"tool_calls is text that does not parse as JS"),
        ({"messages": [_turn(tool_calls=[{"a": 1e999}])]}, r"tool_calls\[0\].a is inf"),
        ({"messages": [_turn(tool_calls=[{"a\ud800": 1}])]}, "a key is no valid Unicode"),
        ({"messages": [_turn(tool_calls=[{"a": "\0"}])]}, r"tool_calls\[0\].a has a NUL"),
        ({"messages": [_turn(tool_calls=[_nested(800)])]}, "nests deeper than 64 levels"),
        ({"messages": [_turn(reasoning_content=3)]}, "reasoning_content must be a string, not a n"),
        ({"messages": [_turn(content=[])]}, r"messages\[0\]: content is empty"),
        ({"messages": [_turn(content=["a"])]}, r"content\[0\]: must be {'type': 'text', .* string"),
        ({"messages": [_turn(content=[{"type": "image"}])]}, r"\[0\]: only .* not type 'image'"),
        ({"prompt": "hi", "tools": "f"}, "tools is text that does not parse as JSON"),
        ({"prompt": "hi", "tools": {}}, "tools must be a list of tools, not an object"),
        ({"prompt": "hi", "tools": ["f"]}, r"tools\[0\]: a tool is an object, not a string"),
        ({"prompt": "hi", "system": "a", "system_prompt": "b"}, "which is the system message, sys"),
        ({"system": "a", "messages": [_turn("system", "b"), _HI]}, "column 'system' or the first"),
        ({"prompt": [_HI, _ANSWER]}, "prompt ends with the assistant's message"),
        ({"prompt": [_HI], "completion": [_HI]}, "completion has to end with the assist"),
        ({"prompt": [_HI], "completion": []}, "completion has to end with the assist"),
    ],
)
def test_bad_rows_are_refused_by_name(row, expected):
    with pytest.raises(UserError, match="^data.train:1: .*" + expected):
        read_examples(({"prompt": "fine"}, row), "data.train")


_PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i", "image_url": None}]
_KEPT = " a\r\nb \N{PARTY POPPER}\N{ZERO WIDTH JOINER} \n"
_TALK = [_turn("system", "s"), _HI, _ANSWER]


@pytest.mark.parametrize(
    ("row", "turns", "given", "response"),
    [
        *(
            ({column: "hi"}, "hi", 0, None)
            for column in ("prompt", "user_message", "input", "question", "instruction", "text")
        ),
        *(
            ({"prompt": "hi", column: "yo"}, "hi", 0, "yo")
            for column in ("response", "completion", "output", "answer", "target")
        ),
        *(({column: _TALK}, "s hi", 0, "yo") for column in ("messages", "turns", "conversations")),
        ({"prompt": _KEPT, "response": _KEPT}, _KEPT, 0, _KEPT),
        ({"text": "hi", "label": 0}, "hi", 0, None),  # a class, not "no"
        ({"system": "s", "prompt": "hi", "output": "yo"}, "s hi", 0, "yo"),
        ({"system_prompt": "s", "conversations": [_HI]}, "s hi", 0, None),
        ({"system": "s", "messages": _TALK}, "s hi", 0, "yo"),
        ({"system": " ", "prompt": "hi"}, "hi", 0, None),
        ({"instruction": "a", "input": "b", "output": "yo"}, "a\n\nb", 0, "yo"),
        ({"instruction": "a", "input": " ", "output": "yo"}, "a", 0, "yo"),
        ({"instruction": "a", "output": "yo", "text": "Do a:\nOut: yo\n"}, "a", 0, "yo"),
        ({"prompt": "hi", "response": 7}, "hi", 0, "7"),
        ({"messages": [_HI, _turn("gpt", "so: 4")], "answer": "4"}, "hi", 0, "so: 4"),
        ({"messages": [_turn("system", ""), _HI, _ANSWER]}, "hi", 0, "yo"),
        ({"messages": [_turn(content=_PARTS)]}, "hi", 0, None),
        ({"prompt": [_HI], "response": [_ANSWER]}, "hi", 1, "yo"),
        ({"prompt": [_HI, _turn("gpt", "a"), _turn(content="b")]}, "hi a b", 3, None),
        ({"prompt": [_HI], "completion": [_ANSWER]}, "hi", 1, "yo"),
        ({"prompt": "hi", "completion": [_ANSWER]}, "hi", 1, "yo"),
        ({"prompt": [_HI], "completion": [_ANSWER, _HI, _ANSWER]}, "hi yo hi", 1, "yo"),
        ({"system": "s", "prompt": [_HI], "completion": [_ANSWER]}, "s hi", 2, "yo"),
        # The chosen one is what is learnt anyway.
        ({"messages": _TALK, "chosen": _TALK, "rejected": [_turn()]}, "s hi", 0, "yo"),
        # The prompt only repeats how the conversation begins.
        ({"prompt": "hi", "messages": _TALK}, "s hi", 0, "yo"),
        ({"prompt": _TALK[:2], "messages": _TALK}, "s hi", 0, "yo"),
        ({"prompt": "hi ", "conversations": [{"from": "human", "value": " hi"}]}, " hi", 0, None),
    ],
)
def test_columns_and_lists_with_one_clear_meaning(row, turns, given, response):
    example = _one(row)
    assert " ".join(turn.content for turn in example.turns) == turns
    assert (example.given, example.response) == (given, response)
    assert not turns.startswith("s ") or example.turns[0].role == "system"


@pytest.mark.parametrize("form", [("role", "content"), ("from", "value")])
def test_roles_have_the_names_that_data_sets_use(form):
    def read(*roles, **how):
        other = dict.fromkeys({"role", "content", "from"} - {*form})  # as in a table: null
        talk = [dict(zip(form, (role, role), strict=True)) | other for role in roles]
        example = _one({"messages": talk}, **how)
        return [turn.role for turn in example.turns], example.answer

    users = ("user", "human", "Human", "USER", "prompter")
    answers = ("assistant", "gpt", "Assistant", "model", "bot", "chatbot", "ChatGPT", "ai")
    for user, answer in itertools.product(users, answers):
        found = read("System", user, answer)
        assert found == (["system", "user"], Message("assistant", answer))
    tools = read("developer", "human", "gpt", "Tool", "observation")
    assert tools == (["developer", "user", "assistant", "tool", "observation"], None)
    told = rf"x:0: messages\[0\]: {form[0]} = 'narrator' is nobody known: it is one of user, human,"
    with pytest.raises(UserError, match=told):
        read("narrator", "user")
    # Roles that are known are what they are.
    found = read("narrator", "gpt", roles=("narrator", "gpt", "model"))
    assert found == (["narrator"], Message("assistant", "gpt"))


_CALL = {"type": "function", "function": {"name": "add", "arguments": {"b": [1, None], "a": 2.5}}}


def test_messages_go_whole_to_the_template():
    talk = [
        _turn(name="Ann", reasoning_content=""),
        {"role": "assistant", "content": None, "tool_calls": [_CALL], "reasoning_content": "so"},
        _turn("tool", "", tool_call_id="c1"),
        _turn("assistant", "3.5", thinking="t", tool_calls=[], reasoning=" r "),
    ]
    example = _one({"messages": talk, "tools": [_CALL]})
    given = [message.for_template() for message in (*example.turns, example.answer)]
    assert given == [
        _turn(name="Ann"),
        _turn("assistant", "", tool_calls=[_CALL], reasoning_content="so"),
        _turn("tool", "", tool_call_id="c1"),
        _turn("assistant", "3.5", thinking="t", reasoning=" r "),
    ]
    # The order of keys is the template's to write, but for those of the message itself.
    assert list(given[1]["tool_calls"][0]["function"]["arguments"]) == ["b", "a"]
    assert example.turns[1].fields.startswith('{"reasoning_content":"so","tool_calls":[{"type":')
    assert json.loads(example.tools) == [_CALL] and ", " not in example.tools
    talk[1] |= {"tool_calls": json.dumps([_CALL])}
    talk[3] |= {"tool_calls": "null"}
    assert _one({"messages": talk, "tools": json.dumps([_CALL])}) == example
    for nothing in ("[]", "null", " "):
        assert _one({"messages": talk, "tools": nothing}).tools == ""


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
    talk = [_HI, _ANSWER | more]
    example = _one({"messages": [*talk, *talk]})
    assert (example.turns[1].learn, example.answer.learn) == (learnt, learnt)
    assert example.turns[1].fields == ""


def test_bad_rows_are_named_all_at_once_or_dropped(caplog):
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
    examples = read_examples(tuple(rows), "data.train", bad_rows=bad_rows)
    assert [(e.name, e.row_id) for e in examples] == [(f"data.train:{i}", i) for i in (0, 3, 8)]
    assert bad_rows.dropped == {"data.train": [f"data.train:{i}" for i in (1, 2, 4, 5, 6, 7)]}
    assert "6 rows dropped (data.bad_rows): data.train:1: response is empty" in caplog.text
    with pytest.raises(UserError, match=r"no row is left of 1, all were dropped: data"):
        read_examples((rows[1],), "data.train", bad_rows=bad_rows)


def test_kinds_of_rows_and_unread_columns_are_logged_once(caplog):
    caplog.set_level("INFO", "absl")
    _one({"prompt": "hi"})
    rows = (
        {"prompt": "hi"},
        {"prompt": "hi", "answer": "yo", "prefix_messages": []},
        {"messages": [_HI, _ANSWER]},
        {"prompt": "hi", "answer": None},
    )
    examples = read_examples(rows, "data.train")
    assert [e.response for e in examples] == [None, "yo", "yo", None]
    assert {e.prefix for e in examples} == {()}
    columns = {"id": 1, "label": 3, "weight": 1, "images": []}
    rows = (
        {"messages": [_turn(score=0, name=None)], **columns},
        {"messages": [_turn(**{"to\nol": "x"})], "id": None, "k\ud800": 0, "context": " "},
    )
    read_examples(rows, "data.train")
    assert [r.getMessage() for r in caplog.records] == [
        "data.train: 3 kinds of rows: 2 of prompt; 1 of prompt, answer, prefix_messages; "
        "1 of messages (the last message is the response)",
        "data.train: columns that nothing reads: 'k\\ud800', context, id, images, label,"
        " messages[].'to\\nol', messages[].score, weight",
    ]


@pytest.mark.parametrize("column", ["answer", "expected", "target"])
def test_questions_expect_one_answer_or_several_compared_as_they_say(column):
    rows = (
        {"question": "hi", column: "yo"},
        {"question": "hi", column: ["yo", "hey"], "match": "exact"},
        {"question": "hi", column: "^y", "match": "regex"},
        {"question": "hi", column: None, "match": None, "output": "yo"},
        {"question": "hi", column: [4, 4.5, -1e22], "choices": []},
        {"question": "hi", column: 0, "response": "well, yo"},
    )
    examples = read_examples(rows, "eval.questions", match="keywords")
    assert [(e.expected, e.response) for e in examples] == [
        (Expected("keywords", ("yo",)), None),
        (Expected("exact", ("yo", "hey")), None),
        (Expected("regex", ("^y",)), None),
        (None, "yo"),
        (Expected("keywords", ("4", "4.5", "-1e+22")), None),
        (Expected("keywords", ("0",)), "well, yo"),
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
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
def test_answers_that_cannot_be_meant_are_refused(row, expected):
    with pytest.raises(UserError, match=rf"^x:0: {expected}"):
        _one({"question": "hi", **row}, match="exact")
