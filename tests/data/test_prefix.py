"""The global prefix out of each of its four keys, and every way in which it can be wrong."""

import json

import pytest

from gkdjax.config import Context
from gkdjax.data.prefix import read_prefix
from gkdjax.types import Message
from gkdjax.utils.errors import UserError

_PAIR = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "é: no"}]
_READ = (Message("system", "be brief"), Message("user", "é: no"))
_YAML = '- role: system\r\n  content: be brief\r\n- {role: user, content: "é: no"}\r\n'
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
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_prefix(Context(**{key: str(path)}, **more))

    return read_it


def test_messages_of_the_config_or_of_a_file_or_none_at_all(read):
    assert read_prefix(Context()) == ()
    assert read_prefix(Context(prefix_messages=tuple(_PAIR))) == _READ
    with pytest.raises(UserError, match=r"context\.prefix_messages\[0\]: content is empty"):
        read_prefix(Context(prefix_messages=({"role": "system", "content": ""},)))
    for name, text in (("p.json", json.dumps(_PAIR)), ("p.yaml", _YAML), ("p.yml", _YAML)):
        assert read("prefix_file", name, text) == _READ
        assert read("prefix_file", name, b"\xef\xbb\xbf" + text.encode()) == _READ


def test_text_and_documents_of_every_kind_are_one_system_message(read):
    (message,) = read("system_prompt_file", "p.md", b"\xef\xbb\xbf  be\r\nbrief \r\n\r\n")
    assert message == Message("system", "  be\nbrief ")
    lines = "\n\n".join(json.dumps(paper) for paper in _PAPERS) + "\n"
    for name, text in (("c.json", json.dumps(_PAPERS)), ("c.jsonl", lines), ("c.txt", _SHOWN)):
        (message,) = read("corpus", name, text, corpus_template="Know {this}: {corpus}!")
        assert message == Message("system", f"Know {{this}}: {_SHOWN}!")
    (message,) = read("corpus", "c.txt", "the text\r\n")
    assert message.role == "system" and message.content.endswith("\n\nthe text")
    assert len(message.content) > 50 and "{corpus}" not in message.content


@pytest.mark.parametrize(
    ("key", "name", "text", "expected"),
    [
        (key, name, text, expected)
        for key, cases in {
            "prefix_file": [
                ("no.json", None, r"^context\.prefix_file = .*no.json: No such file"),
                ("p.txt", "be brief", r"prefix_file = .*p.txt: its name .*system_prompt_file"),
                ("p.json", '{"data": []}', r"prefix_file = .*p.json: must be a list .*, not an ob"),
                ("p.yaml", "be brief", r"prefix_file = .*p.yaml: must be a list .*, not a string"),
                ("p.json", "[]", r"prefix_file = .*p.json: the list is empty"),
                ("p.json", "[", r"p.json: line 1, column 2: does not parse as JSON"),
                ("p.yaml", "- role: [", r"prefix_file = .*: does not parse as YAML: .* line 1,"),
                ("p.yaml", "- {role: user, role: b}", r"YAML: 'role' twice .* line 1,"),
                ("p.yaml", "a\0", r"prefix_file = .*p.yaml: does not parse as YAML: "),
                ("p.yaml", "- 2020-13-45", r"p.yaml: does not parse as YAML: month must be in"),
                ("p.yaml", "[" * 5000, r"p.yaml: does not parse as YAML: maximum recursion"),
                ("p.yaml", "- {role: user, content: 2020-01-01}", r"must be a string, not date"),
                ("p.json", '["be brief"]', r"p.json\[0\] must be {role, content}, not a string"),
                ("p.yaml", "- role: system", r"p.yaml\[0\] has no 'content'; there is \['role'\]"),
                ("p.yaml", "- {content: a}", r"p.yaml\[0\] has no 'role'; there is \['content'\]"),
                ("p.yaml", "- {role: sistem, content: a}", r"'sistem' .*: did you mean 'system'\?"),
                ("p.yaml", "- {role: bot, content: a}", r"'bot' is unknown: it is one of system,"),
                ("p.yaml", "- {role: 1, content: a}", r"\[0\]: role must be a string, not a num"),
                ("p.json", '[{"role": "user", "content": "\\u0000"}]', r"content has a NUL"),
                ("p.yaml", "- {role: user, content: a, name: b}", r"fields beyond role .*: name"),
            ],
            "system_prompt_file": [
                ("no.txt", None, r"^context\.system_prompt_file = .*no.txt: No such file"),
                ("p.txt", " \n", r"system_prompt_file = .*p.txt: the file is empty"),
                ("p.txt", "a\0", r"system_prompt_file = .*p.txt: the text has a NUL at charac"),
            ],
            "corpus": [
                ("no.jsonl", None, r"^context\.corpus = .*no.jsonl: No such file"),
                ("c.csv", "a", r"corpus = .*c.csv: its name must end in .txt, .json or .jsonl"),
                # One document of several fields, of which none is the list of documents.
                (
                    "c.json",
                    '{"title": "A", "questions": ["b"]}',
                    r"corpus = .*c.json: must be a list of documents, not an object",
                ),
                ("c.json", "[]", r"corpus = .*c.json: the list is empty"),
                ("c.json", "[1]", r"c.json:0: a document is a string or an object, not a number"),
                ("c.json", '["a", " "]', r"c.json:1: the document is nothing but white space"),
                ("c.json", '[{"text": null}]', r"c.json:0: the document has no field with a v"),
                ("c.jsonl", '"a"\n{"title": ""}', r"c.jsonl:2: title is empty"),
                ("c.jsonl", '"a"\n\n{"title"}', r"c.jsonl: line 3, column 9: does not parse"),
                ("c.json", '[{"a": {"b": 1}}]', r"c.json:0: a must be a string, .*, not an obj"),
                ("c.json", '[{"a": 1e400}]', r"c.json:0: a is inf, which is no number in JSON"),
                ("c.json", '[{"a": []}]', r"c.json:0: a is an empty list"),
                ("c.json", '[{"a": ["b", 1]}]', r"c.json:0: a\[1\] must be a string, not a num"),
            ],
        }.items()
        for name, text, expected in cases
    ],
)
def test_what_is_no_prefix_is_refused_by_key_or_file(read, key, name, text, expected):
    with pytest.raises(UserError, match=expected):
        read(key, name, text)
