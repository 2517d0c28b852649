"""Conversations whose earlier messages become the prefix of their later ones."""

import dataclasses
import logging

import pytest

from gkdjax.data import views
from gkdjax.data.conversations import answers_apart, history_as_prefix
from gkdjax.data.examples import read_examples
from gkdjax.data.loss_mask import TargetRules
from gkdjax.types import Example, Expected, Message
from gkdjax.utils.errors import UserError

_ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def _said(words: str) -> tuple[Message, ...]:
    """ "u1 a1" -> the messages "u1" by the user and "a1" by the assistant."""
    return tuple(Message(_ROLES[word[0]], word) for word in words.split())


def _rows(*conversations: str, **more) -> list[Example]:
    rows = tuple({"messages": [m.for_template() for m in _said(c)], **more} for c in conversations)
    return read_examples(rows, "data.train")


def _shown(examples: list[Example]) -> list[tuple[str, str, str | None]]:
    """(prefix, turns, response), in words."""
    return [
        (*(" ".join(m.content for m in said) for said in (e.prefix, e.turns)), e.response)
        for e in examples
    ]


@pytest.mark.parametrize(
    ("conversation", "expected"),
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
def test_each_turn_of_the_assistant_is_an_example_with_all_before_it(conversation, expected):
    rows = _rows(conversation)
    assert _shown(history_as_prefix(rows, "data.train")) == expected
    assert _shown(history_as_prefix(rows, "data.train", last_only=True)) == expected[-1:]


def test_names_ids_and_answers(caplog):
    rows = _rows("u1 a1", "u1 a1 u2 a2 u3", "s u1 a1")
    with caplog.at_level(logging.INFO, "absl"):
        made = history_as_prefix(rows, "data.train")
    assert [(e.name, e.row_id) for e in made] == [
        ("data.train:0", 0),
        ("data.train:1[1]", 1),
        ("data.train:1[3]", 2),
        ("data.train:1[5]", 3),
        ("data.train:2", 4),
    ]
    assert [r.getMessage() for r in caplog.records] == [
        "data.train: 3 rows, as 5 turns with their history"
    ]
    asked = [dataclasses.replace(row, expected=Expected("exact", ("yes",))) for row in rows]
    (first, second, third) = history_as_prefix(asked, "eval.questions", last_only=True)
    assert {one.expected.any_of for one in (first, second, third)} == {("yes",)}
    assert (second.name, second.row_id) == ("data.train:1[5]", 1)


def test_a_row_with_a_prefix_of_its_own_stays_as_it_is():
    rows = _rows("u1 a1 u2 a2", prefix_messages=[{"role": "system", "content": "s"}])
    assert history_as_prefix(rows, "data.train") == rows
    rows = _rows("u1 a1 u2 a2", prefix_messages=[])
    assert len(history_as_prefix(rows, "data.train")) == 2


def test_a_conversation_that_the_assistant_begins_is_refused_by_name():
    with pytest.raises(UserError, match=r"^data\.train:1: context\.history_as_prefix: the first"):
        history_as_prefix(_rows("u1 a1", "a1 u1 a2"), "data.train")


def test_every_message_of_the_assistant_is_a_target_once_and_the_student_reads_what_it_keeps(
    chat_of,
):
    """`student_retained_turns` beyond the history keeps all of it."""
    chat = chat_of("chatml")
    made = history_as_prefix(_rows("s u1 a1 u2 a2 a3 u3 a4"), "data.train")
    for retained, student_reads in (
        (0, ["u1 a1", "u2 a2 a3", "u3 a4"]),
        (2, ["s u1 a1", "u1 a1 u2 a2 a3", "a2 a3 u3 a4"]),
        (99, ["s u1 a1", "s u1 a1 u2 a2 a3", "s u1 a1 u2 a2 a3 u3 a4"]),
    ):
        targets = []
        for example, words in zip(made, student_reads, strict=True):
            rules = views.ViewRules(chat, chat, retained, TargetRules(("assistant",)), 1000, "drop")
            pair, fate = rules.pair(example, None)
            assert fate is views.RowStatus.KEPT
            whole, _ = chat.render(_said(words), (False,) * len(words.split()), "all")
            assert list(pair.student.ids) == list(whole[: len(pair.student.ids)])
            all_before = (*example.prefix, *example.turns, Message("assistant", example.response))
            whole, _ = chat.render(all_before, (False,) * len(all_before), "all")
            assert list(pair.teacher.ids) == list(whole[: len(pair.teacher.ids)])
            targets.append(chat.decode(pair.target_ids))
        assert targets == ["a1", "a2a3", "a4"]


@pytest.mark.parametrize(
    ("conversation", "roles", "pattern", "expected"),
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
    conversation, roles, pattern, expected
):
    rows = _rows(conversation, prefix_messages=[{"role": "system", "content": "p"}])
    rules = TargetRules(tuple(_ROLES[role] for role in roles), pattern)
    made = answers_apart([*rows, *rows], "data.train", rules)
    found = [(" ".join(m.content for m in e.turns), e.response, e.given) for e in made]
    assert found == expected * 2
    assert [e.row_id for e in made] == list(range(len(made)))
    assert {e.prefix for e in made} == {(Message("system", "p"),)}
    assert len({e.name for e in made}) == len(expected)


def test_answers_apart_are_counted_in_the_log(caplog):
    rules = TargetRules(("assistant",))
    with caplog.at_level(logging.INFO, "absl"):
        assert len(answers_apart(_rows("u1 a1", "u2"), "data.train", rules)) == 2
        assert "one answer each" not in caplog.text
        answers_apart(_rows("u1 a1 u2 a2", "u2"), "data.train", rules)
    assert "data.train: 2 rows, as 3 with one answer each" in caplog.text


def test_answers_that_are_not_learnt_are_history_alone():
    said = [m.for_template() for m in _said("u1 a1 u2 a2 u3 a3 u4")]
    said[3]["weight"] = 0
    rows = ({"messages": said[:6]}, {"messages": said[:4]}, {"messages": said})
    made = history_as_prefix(read_examples(rows, "data.train"), "data.train")
    last = ("u1 a1 u2 a2", "u3", "a3")
    assert _shown(made) == [
        *(("", "u1", "a1"), last, ("", "u1", "a1"), ("", "u1", "a1"), last),
        ("u1 a1 u2 a2 u3 a3", "u4", None),
    ]
    assert [row.row_id for row in made] == list(range(6))
    # A prompt that is a list is read and never learnt.
    (row,) = read_examples(({"prompt": said[:5], "completion": said[5:6]},), "data.train")
    (made,) = history_as_prefix([row], "data.train")
    assert (_shown([made]), made.given, made.name) == ([last], 1, "data.train:0[5]")
    (part, _) = history_as_prefix([dataclasses.replace(row, given=1)], "data.train")
    assert (part.given, part.response) == (1, "a1")
