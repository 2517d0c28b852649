"""Conversations whose earlier messages become the prefix of later ones, or given turns."""

import dataclasses
import types

import pytest

from gkdjax.data import conversations
from gkdjax.data.examples import BadRows, read_examples
from gkdjax.data.loss_mask import TargetRules
from gkdjax.types import Example, Expected, Message
from gkdjax.utils.errors import UserError

_ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
_OWN_PREFIX = [{"role": "system", "content": "p"}]


def _messages(words: str) -> tuple[Message, ...]:
    """ "u1 a1" -> the messages "u1" by the user and "a1" by the assistant."""
    return tuple(Message(_ROLES[word[0]], word) for word in words.split())


def _rows(*talks: str, **more) -> list[Example]:
    rows = [{"messages": [m.for_template() for m in _messages(t)], **more} for t in talks]
    return read_examples(tuple(rows), "data.train")


def _with_history(rows, **how) -> list[Example]:
    return conversations.history_as_prefix(rows, "x", ("assistant",), BadRows(), **how)


def _shown(examples: list[Example]) -> list[tuple[str, str, str | None]]:
    """(prefix, turns, response), in words."""
    return [
        (*(" ".join(m.content for m in part) for part in (e.prefix, e.turns)), e.response)
        for e in examples
    ]


@pytest.mark.parametrize(
    ("talk", "expected"),
    [
        ("u1 a1", [("", "u1", "a1")]),
        ("u1", [("", "u1", None)]),
        ("s u1 a1", [("s", "u1", "a1")]),
        ("u1 a1 u2 a2", [("", "u1", "a1"), ("u1 a1", "u2", "a2")]),
        ("s u1 a1 u2", [("s", "u1", "a1"), ("s u1 a1", "u2", None)]),
        ("u1 u2 a1 u3 u4 a2", [("", "u1 u2", "a1"), ("u1 u2 a1", "u3 u4", "a2")]),
        ("u1 a1 s u2 a2", [("", "u1", "a1"), ("u1 a1 s", "u2", "a2")]),
        ("u1 a1 u2 s a2", [("", "u1", "a1"), ("u1 a1", "u2 s", "a2")]),
        ("s1 s2 a1", [("s1", "s2", "a1")]),
        ("s a1 u1 a2", [("", "s", "a1"), ("s a1", "u1", "a2")]),
        ("u1 a1 a2 u2 a3", [("", "u1 a1", "a2"), ("u1 a1 a2", "u2", "a3")]),
        # A tool's result belongs to the turn of the answer that has called it.
        ("u1 a1 t1 a2 u2 a3", [("", "u1 a1 t1", "a2"), ("u1 a1 t1 a2", "u2", "a3")]),
    ],
)
def test_each_turn_of_the_assistant_is_an_example_with_all_before_it(talk, expected):
    rows = _rows(talk)
    assert _shown(_with_history(rows)) == expected
    assert _shown(_with_history(rows, last_only=True)) == expected[-1:]
    rows = _rows(talk, prefix_messages=_OWN_PREFIX)
    assert _with_history(rows) == rows


def test_names_ids_and_answers_of_parts():
    rows = [
        dataclasses.replace(r, expected=Expected("exact", ("yes",)))
        for r in _rows("u1 a1 u2", "u1")
    ]
    made = _with_history(rows)
    assert [(e.name, e.row_id) for e in made] == [
        ("data.train:0[1]", 0),
        ("data.train:0[3]", 1),
        ("data.train:1", 2),
    ]
    last = _with_history(rows, last_only=True)
    assert [(e.name, e.row_id) for e in last] == [("data.train:0[3]", 0), ("data.train:1", 1)]
    assert {e.expected.any_of for e in made} == {("yes",)}
    with pytest.raises(UserError, match=r"^data\.train:1: context\.history_as_prefix: the first"):
        _with_history(_rows("u1 a1", "a1 u1 a2"))


@pytest.mark.parametrize(
    ("talk", "roles", "pattern", "expected"),
    [
        ("u1 a1", "a", None, [("u1", "a1", 0)]),
        ("u1", "a", None, [("u1", None, 0)]),
        ("u1 a1 u2 a2", "a", None, [("u1", "a1", 0), ("u1 a1 u2", "a2", 2)]),
        ("s u1 a1 u2", "a", None, [("s u1", "a1", 0), ("s u1 a1 u2", None, 3)]),
        ("u1 a1 a2", "a", None, [("u1", "a1", 0), ("u1 a1", "a2", 2)]),
        ("a1 u1 a2", "au", None, [("", "a1", 0), ("a1 u1", "a2", 1)]),
        ("u1 a1 u2 a2", "u", None, [("u1 a1 u2", "a2", 0)]),
        ("u1 a1 u2 a2", "a", "2", [("u1 a1 u2", "a2", 0)]),
        ("u1 a1 u2 a2", "a", "1", [("u1", "a1", 0)]),
        ("u1 a1 u2 a2", "au", "a1|u2", [("u1", "a1", 0), ("u1 a1 u2", "a2", 2)]),
        ("u1 a1 u2 a2", "a", "3", [("u1 a1 u2", "a2", 0)]),
    ],
)
def test_each_answer_that_is_learnt_can_be_a_row_with_all_before_it_given(
    talk, roles, pattern, expected, caplog
):
    caplog.set_level("INFO", "absl")
    chat = types.SimpleNamespace(earlier_answers=False)
    targets = TargetRules(tuple(_ROLES[role] for role in roles), pattern)
    rules = types.SimpleNamespace(student_chat=chat, teacher_chat=chat, targets=targets)
    rows = _rows(talk, talk, prefix_messages=_OWN_PREFIX)
    made = conversations.split_answers(rows, "x", rules)
    found = [(" ".join(m.content for m in e.turns), e.response, e.given) for e in made]
    assert found == expected * 2
    assert [e.row_id for e in made] == list(range(len(made)))
    assert {e.prefix for e in made} == {(Message("system", "p"),)}
    assert len({e.name for e in made}) == len(made)
    assert (f"x: 2 rows, as {len(made)} with one answer each" in caplog.text) == (len(made) > 2)


def test_answers_that_are_not_learnt_are_history_alone():
    talk = [m.for_template() for m in _messages("u1 a1 u2 a2 u3 a3 u4")]
    talk[3]["weight"] = 0
    rows = ({"messages": talk[:6]}, {"messages": talk[:4]}, {"messages": talk})
    made = _with_history(read_examples(rows, "data.train"))
    first, last = ("", "u1", "a1"), ("u1 a1 u2 a2", "u3", "a3")
    assert _shown(made) == [
        *(first, last, first, first, last),
        ("u1 a1 u2 a2 u3 a3", "u4", None),
    ]
    # A prompt that is a list is read and never learnt.
    (row,) = read_examples(({"prompt": talk[:5], "completion": talk[5:6]},), "data.train")
    (made,) = _with_history([row])
    assert (_shown([made]), made.given, made.name) == ([last], 1, "data.train:0[5]")
    row = dataclasses.replace(row, given=1)
    (part, _) = _with_history([row])
    assert (part.given, part.response) == (1, "a1")
    parts = conversations.answers_of(row, TargetRules(("assistant",)))
    assert [part.given for part in parts] == [1, 2]
