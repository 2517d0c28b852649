"""The global prefix out of each of its four keys, and every way in which it can be wrong."""

import json

import pytest

from gkdjax.config import Context
from gkdjax.data.prefix import read_prefix
from gkdjax.types import Message
from gkdjax.utils.errors import UserError

_PAIR = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "é: no"}]
_READ = (Message("system", "be brief"), Message("user", "é: no"))
_PAPERS = [
    {"title": "Attention", "abstract": "We\nattend."},
    {"title": "GKD", "abstract": "On-policy.", "year": 2023, "authors": ["A", "B"], "note": None},
    {"text": "plain {corpus}"},
    "a string",
]
_SHOWN = """\
Title: Attention
Abstract: We
attend.

Title: GKD
Abstract: On-policy.
Year: 2023
Authors: A, B

plain {corpus}

a string"""


@pytest.fixture
def read(tmp_path):
    """read(key, file's name, its text) -> the prefix."""

    def read_it(key, name, text, **more):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_prefix(Context(**{key: str(path)}, **more))

    return read_it


def test_messages_of_the_config_and_none_at_all():
    assert read_prefix(Context()) == ()
    assert read_prefix(Context(prefix_messages=tuple(_PAIR))) == _READ
    with pytest.raises(UserError, match=r"context\.prefix_messages\[0\]: content is empty"):
        read_prefix(Context(prefix_messages=({"role": "system", "content": ""},)))


def test_a_list_of_messages_in_a_file(read):
    as_json = json.dumps(_PAIR)
    as_yaml = '- role: system\r\n  content: be brief\r\n- {role: user, content: "é: no"}\r\n'
    assert read("prefix_file", "p.json", as_json) == _READ
    assert read("prefix_file", "p.json", b"\xef\xbb\xbf" + as_json.encode()) == _READ
    assert read("prefix_file", "p.yaml", as_yaml) == _READ
    assert read("prefix_file", "p.yml", b"\xef\xbb\xbf" + as_yaml.encode()) == _READ


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", "be brief", r"prefix_file = .*p.txt: its name must .*system_prompt_file"),
        ("p.json", "{}", r"prefix_file = .*p.json: must be a list of .*, not an object"),
        ("p.yaml", "be brief", r"prefix_file = .*p.yaml: must be a list of .*, not a string"),
        ("p.json", "[]", r"prefix_file = .*p.json: the list is empty"),
        ("p.json", "", r"prefix_file = .*p.json: the file is empty"),
        ("p.json", "[", r"p.json: line 1, column 2: does not parse as JSON"),
        ("p.yaml", "- role: [", r"prefix_file = .*p.yaml: does not parse as YAML: .* line 1,"),
        ("p.yaml", "- {role: user, content: a, content: b}", r"YAML: 'content' twice .* line 1,"),
        ("p.yaml", "a\0", r"prefix_file = .*p.yaml: does not parse as YAML: "),
        ("p.yaml", "- 2020-13-45", r"p.yaml: does not parse as YAML: month must be in 1..12"),
        ("p.yaml", "[" * 5000, r"p.yaml: does not parse as YAML: maximum recursion"),
        ("p.yaml", "- {role: user, content: 2020-01-01}", r"content must be a string, not date"),
        ("p.yaml", b"- \xff", r"prefix_file = .*p.yaml: is not UTF-8: line 1 "),
        ("p.json", '["be brief"]', r"p.json\[0\] must be {role, content}, not a string"),
        ("p.yaml", "- role: system", r"p.yaml\[0\] has no 'content'; there is \['role'\]"),
        ("p.yaml", "- {content: a}", r"p.yaml\[0\] has no 'role'; there is \['content'\]"),
        (
            "p.yaml",
            "- {role: user, content: a}\n- {role: sistem, content: a}",
            r"p.yaml\[1\]: role = 'sistem' is unknown: did you mean 'system'\?",
        ),
        ("p.yaml", "- {role: bot, content: a}", r"'bot' is unknown: it is one of system, dev"),
        ("p.yaml", "- {role: user, content: yes}", r"\[0\]: content must be a string, not true"),
        ("p.yaml", "- {role: 1, content: a}", r"p.yaml\[0\]: role must be a string, not a num"),
        ("p.json", '[{"role": "user", "content": "\\u0000"}]', r"\[0\]: content has a NUL"),
        ("p.json", '[{"role": "user", "content": "\\ud800"}]', r"\[0\]: content is no valid Un"),
        ("p.json", '[{"role": "user", "content": " "}]', r"\[0\]: content is nothing but white"),
        (
            "p.json",
            '[{"role": "user", "content": "a", "name": "b"}]',
            r"p.json\[0\] has fields beyond role and content: name",
        ),
    ],
)
def test_a_bad_prefix_file_is_refused(read, name, text, expected):
    with pytest.raises(UserError, match=expected):
        read("prefix_file", name, text)


def test_plain_text_is_one_system_message(read):
    (message,) = read("system_prompt_file", "p.md", b"\xef\xbb\xbf  be\r\nbrief \r\n\r\n")
    assert message == Message("system", "  be\nbrief ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" \n", r"system_prompt_file = .*p.txt: the file is empty"),
        ("a\0", r"system_prompt_file = .*p.txt: the text has a NUL at character 1"),
        (b"a\n\xff", r"system_prompt_file = .*p.txt: is not UTF-8: line 2 "),
    ],
)
def test_bad_plain_text_is_refused(read, text, expected):
    with pytest.raises(UserError, match=expected):
        read("system_prompt_file", "p.txt", text)


def test_a_missing_file_is_named_with_its_key():
    for key, name in (
        ("prefix_file", "no.json"),
        ("system_prompt_file", "no.txt"),
        ("corpus", "no.jsonl"),
    ):
        with pytest.raises(UserError, match=rf"^context\.{key} = {name}: No such file"):
            read_prefix(Context(**{key: name}))


def test_documents_of_every_kind_go_into_the_template(read):
    lines = "\n\n".join(json.dumps(paper) for paper in _PAPERS) + "\n"
    for name, text in (("c.json", json.dumps(_PAPERS)), ("c.jsonl", lines), ("c.txt", _SHOWN)):
        (message,) = read("corpus", name, text, corpus_template="Know {this}: {corpus}!")
        assert message == Message("system", f"Know {{this}}: {_SHOWN}!")
    (message,) = read("corpus", "c.txt", "the text\r\n")
    assert message.role == "system" and message.content.endswith("\n\nthe text")
    assert len(message.content) > 50 and "{corpus}" not in message.content


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("c.csv", "a", r"corpus = .*c.csv: its name must end in .txt, .json or .jsonl"),
        ("c.json", '{"papers": []}', r"corpus = .*c.json: must be a list of doc.*, not an obj"),
        ("c.json", "[]", r"corpus = .*c.json: the list is empty"),
        ("c.txt", "", r"corpus = .*c.txt: the file is empty"),
        ("c.txt", "a\0", r"corpus = .*c.txt: the text has a NUL"),
        ("c.json", "[1]", r"c.json:0: a document is a string or an object, not a number"),
        ("c.json", '["a", " "]', r"c.json:1: the document is nothing but white space"),
        ("c.json", "[{}]", r"c.json:0: the document has no field with a value"),
        ("c.json", '[{"text": null}]', r"c.json:0: the document has no field with a value"),
        ("c.jsonl", '"a"\n{"title": ""}', r"c.jsonl:2: title is empty"),
        ("c.jsonl", '"a"\n\n{"title"}', r"c.jsonl: line 3, column 9: does not parse as JSON"),
        ("c.json", '[{"a": {"b": 1}}]', r"c.json:0: a must be a string, .*, not an object"),
        ("c.json", '[{"a": []}]', r"c.json:0: a is an empty list"),
        ("c.json", '[{"a": ["b", 1]}]', r"c.json:0: a\[1\] must be a string, not a number"),
    ],
)
def test_a_bad_corpus_is_refused(read, name, text, expected):
    with pytest.raises(UserError, match=expected):
        read("corpus", name, text)
