"""Rows that lose their oldest messages, until they fit."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdjax.data.truncation import without_oldest_rounds, without_prefix_rounds
from gkdjax.types import Example, Message

_ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def _said(words: str) -> tuple[Message, ...]:
    """ "u1 aaa" -> the messages "u1" by the user and "aaa" by the assistant."""
    return tuple(Message(_ROLES[word[0]], word) for word in words.split())


def _row(prefix: str, turns: str, given: int = 0) -> Example:
    return Example("rows:0", 0, _said(prefix), _said(turns), None, None, given)


def _characters(example: Example) -> int:
    return sum(len(m.content) for m in (*example.prefix, *example.turns))


def _shown(example: Example | None) -> tuple[str, str] | None:
    if example is None:
        return None
    prefix, turns = (" ".join(m.content for m in part) for part in (example.prefix, example.turns))
    return prefix, turns


class _Letters:
    """A tokenizer with a token for each character."""

    def tokenize(self, text):
        return text, [(i, i + 1) for i in range(len(text))]


def _shorten(how, row, most):
    return how(row, lambda example: _characters(example) - most, _Letters())


@pytest.mark.parametrize(
    ("prefix", "most", "expected"),
    [
        ("s1 u1 a1 u2 a2", 12, "s1 u1 a1 u2 a2"),
        ("s1 u1 a1 u2 a2", 11, "s1 u2 a2"),
        ("s1 u1 a1 u2 a2", 8, "s1 u2 a2"),
        ("s1 u1 a1 u2 a2", 7, "s1"),
        ("s1 u1 a1 u2 a2", 3, "s"),
        ("s1 u1 a1 u2 a2", 2, None),  # nothing is left that the student would not read as well
        ("s1 u1 a1 u2 a2", 1, None),
        ("s1 s2 u1 a1", 6, "s1 s2"),
        ("s1 s2 u1 a1", 5, "s s2"),
        ("s1 s2 u1 a1", 4, "s2"),
        ("s1 s2 u1 a1", 3, "s"),
        ("u1 a1 t1 u2 a2 a3", 12, "u2 a2 a3"),  # a round is all up to the next question
        ("u1 a1 u2 a2", 6, "u2 a2"),
        ("u1 a1 u2 a2", 5, "u a2"),
        ("u1 a1 u2 a2", 4, None),  # an answer alone answers nothing
        ("sabcdef", 5, "sab"),
        ("", 2, ""),
        ("", 1, None),
    ],
)
def test_the_prefix_loses_rounds_then_the_end_of_its_first_text(prefix, most, expected):
    row = _row(prefix, "uu")
    found = _shorten(without_prefix_rounds, row, most)
    assert _shown(found) == (None if expected is None else (expected, "uu"))
    if expected == prefix:
        assert found is row


@pytest.mark.parametrize(
    ("prefix", "turns", "most", "expected"),
    [
        ("s1 u1 a1", "s2 u2 a2 u3", 14, ("s1 u1 a1", "s2 u2 a2 u3")),
        ("s1 u1 a1", "s2 u2 a2 u3", 13, ("s1", "s2 u2 a2 u3")),
        ("s1 u1 a1", "s2 u2 a2 u3", 9, ("s1", "s2 u3")),
        ("s1 u1 a1", "s2 u2 a2 u3", 5, ("1", "s2 u3")),
        ("s1 u1 a1", "s2 u2 a2 u3", 4, None),  # nothing is left that only the teacher reads
        ("", "s2 u2 a2 u3", 4, ("", "s2 u3")),
        ("", "s2 u2 a2 u3", 3, ("", "2 u3")),
        ("", "s2 u2 a2 u3", 2, ("", "u3")),
        ("", "s2 u2 a2 u3", 1, ("", "3")),
        ("", "s2 u2 a2 u3", 0, None),
        ("u1 a1 u2 a2", "u3", 6, ("u2 a2", "u3")),
        ("u1 a1 u2 a2", "u3", 5, ("2 a2", "u3")),
        ("u1 a1 u2 a2", "u3", 4, None),  # an answer alone answers nothing
        ("", "u1 u2abc", 5, ("", "u2abc")),
        ("", "u1 u2abc", 4, ("", "2abc")),
        ("", "s1", 1, ("", "1")),
        ("", "s1", 0, None),
    ],
)
def test_the_oldest_rounds_go_then_the_beginning_of_the_first_text(prefix, turns, most, expected):
    row = _row(prefix, turns)
    found = _shorten(without_oldest_rounds, row, most)
    assert _shown(found) == expected
    if expected == (prefix, turns):
        assert found is row


@pytest.mark.parametrize("how", [without_prefix_rounds, without_oldest_rounds])
def test_a_row_of_which_the_teacher_would_read_no_more_than_the_student_is_lost(how):
    row, letters = _row("s1 u1 a1 u2 a2", "u3"), _Letters()

    def shortened(most, retained):
        return _shown(how(row, lambda e: _characters(e) - most, letters, retained))

    for most, left in ((8, "s1 u2 a2"), (4, "s1")):
        messages = len(left.split())
        assert shortened(most, messages - 1) == (left, "u3")
        assert shortened(most, messages) is None
    assert shortened(12, 9) == shortened(12, 0) == ("s1 u1 a1 u2 a2", "u3")
    assert shortened(8, 9) == ("s1 u2 a2", "u3")  # it read no more at first either


def test_given_turns_stay_counted():
    row = _row("", "s1 u1 a1 u2 a2 u3", given=3)
    for most, given_, left in ((12, 3, 6), (11, 1, 4), (4, 1, 2), (2, 0, 1)):
        found = _shorten(without_oldest_rounds, row, most)
        assert (found.given, len(found.turns)) == (given_, left)
    whole = dataclasses.replace(row, given=6)
    assert _shorten(without_oldest_rounds, whole, 4).given == 2


_word = st.text("ab .\n\u00e9\U0001f642", min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=80, deadline=None)
@given(said=st.lists(_word, min_size=3, max_size=7), data=st.data())
def test_what_is_left_is_as_long_as_it_may_be_but_for_a_few_tokens(chat_of, said, data):
    """Of a single message, where the text has to be cut, with a real tokenizer."""
    chat = chat_of("chatml")
    turns = (Message("user", "so?"),)

    def length(example):
        return len(chat.prompt_ids((*example.prefix, *example.turns)))

    row = Example("rows:0", 0, (Message("system", "x".join(said)),), turns, None, None)
    bare = length(dataclasses.replace(row, prefix=()))
    most = data.draw(st.integers(bare + 1, max(bare + 1, length(row) - 1)))
    for how in (without_prefix_rounds, without_oldest_rounds):
        found = how(row, lambda e: length(e) - most, chat)
        assert length(found) <= most
        if found.prefix:
            text, whole = found.prefix[0].content, row.prefix[0].content
            assert whole.startswith(text) if how is without_prefix_rounds else whole.endswith(text)
            # White space at the cut goes too: at most a word's worth of it.
            assert length(found) >= most - 12
