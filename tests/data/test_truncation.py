"""Rows that lose their oldest messages until they fit, or are too long for a model."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdjax.config import Context
from gkdjax.data import truncation
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.truncation import without_oldest_rounds, without_prefix_rounds
from gkdjax.data.views import ViewRules
from gkdjax.types import ContextLimit, Example, Message
from gkdjax.utils.errors import UserError

_ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def _messages(words: str) -> tuple[Message, ...]:
    """ "u1 aaa" -> the messages "u1" by the user and "aaa" by the assistant."""
    return tuple(Message(_ROLES[word[0]], word) for word in words.split())


def _row(words: str, given: int = 0) -> Example:
    """ "s1 | u1" -> a row with the prefix "s1" and the turns "u1"."""
    prefix, turns = map(_messages, words.split("|"))
    return Example("rows:0", 0, prefix, turns, None, None, given)


class _Letters:
    """A tokenizer with a token for each character."""

    def tokenize(self, text):
        return text, [(i, i + 1) for i in range(len(text))]


def _cut(how, row, most, retained=0) -> Example | None:
    def excess(example):
        return sum(len(m.content) for m in (*example.prefix, *example.turns)) - most

    return how(row, excess, _Letters(), retained)


@pytest.mark.parametrize(
    ("how", "words", "most", "retained", "expected"),
    [
        # The prefix loses rounds, then the end of its first text.
        (without_prefix_rounds, "s1 u1 a1 u2 a2 | uu", 12, 0, "s1 u1 a1 u2 a2 | uu"),
        (without_prefix_rounds, "s1 u1 a1 u2 a2 | uu", 8, 0, "s1 u2 a2 | uu"),
        (without_prefix_rounds, "s1 u1 a1 u2 a2 | uu", 7, 0, "s1 | uu"),
        (without_prefix_rounds, "s1 u1 a1 u2 a2 | uu", 3, 0, "s | uu"),
        (without_prefix_rounds, "s1 u1 a1 u2 a2 | uu", 2, 0, None),  # all that the student lacks
        (without_prefix_rounds, "s1 s2 u1 a1 | uu", 5, 0, "s s2 | uu"),
        (without_prefix_rounds, "s1 s2 u1 a1 | uu", 4, 0, "s2 | uu"),
        (without_prefix_rounds, "u1 a1 t1 u2 a2 a3 | uu", 12, 0, "u2 a2 a3 | uu"),
        (without_prefix_rounds, "u1 a1 u2 a2 | uu", 6, 0, "u2 a2 | uu"),
        (without_prefix_rounds, "u1 a1 u2 a2 | uu", 5, 0, "u a2 | uu"),
        (without_prefix_rounds, "u1 a1 u2 a2 | uu", 4, 0, None),  # an answer alone answers nothing
        (without_prefix_rounds, "sabcdef | uu", 5, 0, "sab | uu"),
        (without_prefix_rounds, " | uu", 2, 0, " | uu"),
        (without_prefix_rounds, " | uu", 1, 0, None),
        # The oldest rounds go, then the beginning of the first text.
        (without_oldest_rounds, "s1 u1 a1 | s2 u2 a2 u3", 14, 0, "s1 u1 a1 | s2 u2 a2 u3"),
        (without_oldest_rounds, "s1 u1 a1 | s2 u2 a2 u3", 10, 0, "s1 | s2 u2 a2 u3"),
        (without_oldest_rounds, "s1 u1 a1 | s2 u2 a2 u3", 9, 0, "s1 | s2 u3"),
        (without_oldest_rounds, "s1 u1 a1 | s2 u2 a2 u3", 5, 0, "1 | s2 u3"),
        (without_oldest_rounds, "s1 u1 a1 | s2 u2 a2 u3", 4, 0, None),
        (without_oldest_rounds, " | s2 u2 a2 u3", 3, 0, " | 2 u3"),
        (without_oldest_rounds, " | s2 u2 a2 u3", 2, 0, " | u3"),
        (without_oldest_rounds, " | s2 u2 a2 u3", 1, 0, " | 3"),
        (without_oldest_rounds, " | s2 u2 a2 u3", 0, 0, None),
        (without_oldest_rounds, "u1 a1 u2 a2 | u3", 5, 0, "2 a2 | u3"),
        (without_oldest_rounds, "u1 a1 u2 a2 | u3", 4, 0, None),
        (without_oldest_rounds, " | u1 u2abc", 4, 0, " | 2abc"),
        (without_oldest_rounds, " | s1", 1, 0, " | 1"),
        (without_oldest_rounds, " | s1", 0, 0, None),
        # A row is lost if the teacher would read no more than the student, but did at first.
        *(
            (how, "s1 u1 a1 u2 a2 | u3", *case)
            for how in (without_prefix_rounds, without_oldest_rounds)
            for case in (
                *((8, 2, "s1 u2 a2 | u3"), (8, 3, None), (4, 0, "s1 | u3"), (4, 1, None)),
                *((12, 9, "s1 u1 a1 u2 a2 | u3"), (8, 9, "s1 u2 a2 | u3")),
            )
        ),
    ],
)
def test_rows_lose_their_oldest_messages_until_they_fit(how, words, most, retained, expected):
    row = _row(words)
    found = _cut(how, row, most, retained)
    parts = () if found is None else (found.prefix, found.turns)
    shown = " | ".join(" ".join(message.content for message in part) for part in parts)
    assert (shown or None) == expected
    assert (found is row) == (expected == words)


@pytest.mark.parametrize(
    ("given_", "most", "expected"),
    [(3, 12, (3, 6)), (3, 11, (1, 4)), (3, 4, (1, 2)), (3, 2, (0, 1)), (6, 4, (2, 2))],
)
def test_given_turns_stay_counted(given_, most, expected):
    found = _cut(without_oldest_rounds, _row("| s1 u1 a1 u2 a2 u3", given_), most)
    assert (found.given, len(found.turns)) == expected


_text = st.text("ab .\n\u00e9\U0001f642", min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(_text, min_size=3, max_size=7), data=st.data())
def test_the_rest_is_as_long_as_it_may_be_but_for_a_few_tokens(chat_of, texts, data):
    """Of a single message, where the text has to be cut, with a real tokenizer."""
    chat = chat_of("chatml")

    def length(example):
        return len(chat.prompt_ids((*example.prefix, *example.turns)))

    turns, whole = (Message("user", "so?"),), "x".join(texts)
    row = Example("rows:0", 0, (Message("system", whole),), turns, None, None)
    bare = length(dataclasses.replace(row, prefix=()))
    most = data.draw(st.integers(bare + 1, max(bare + 1, length(row) - 1)))
    for how, is_part in (
        (without_prefix_rounds, whole.startswith),
        (without_oldest_rounds, whole.endswith),
    ):
        found = how(row, lambda e: length(e) - most, chat)
        assert length(found) <= most
        # White space at the cut goes too: at most a word's worth of it.
        if found.prefix:
            assert is_part(found.prefix[0].content) and length(found) >= most - 12


_PREFIX = (
    Message("system", "a.b.c.d.e.f."),
    *(Message("user", "one?"), Message("assistant", "1")),
    *(Message("user", "two?"), Message("assistant", "2")),
)


def _rows(*responses, prefix=_PREFIX):
    answers = [r and Message("assistant", r) for r in responses]
    turns = (Message("user", "so?"),)
    return [
        Example(f"rows:{i}", i, prefix, turns, answer, None) for i, answer in enumerate(answers)
    ]


def _rules(chat, **changes):
    rules = ViewRules(chat, chat, 0, TargetRules(("assistant",)), 4096, "truncate-prefix")
    return dataclasses.replace(rules, **changes)


@pytest.fixture
def chat(chat_of):
    return chat_of("chatml")


@pytest.mark.parametrize("too_long", ["truncate-prefix", "truncate-left"])
@pytest.mark.parametrize(("response", "room"), [("yes", 0), (None, 5)])
def test_rows_fit_with_the_response_that_they_have_or_may_get(chat, too_long, response, room):
    (row,) = _rows(response)
    whole = max(_rules(chat).lengths(row)) + room
    rules = _rules(chat, too_long=too_long, max_length=whole)
    assert truncation.shortened(row, rules, 5) is row
    shorter = truncation.shortened(row, dataclasses.replace(rules, max_length=whole - 1), 5)
    assert shorter.prefix == (_PREFIX[0], *_PREFIX[3:])


def test_only_rows_that_may_lose_their_beginning_do(chat, chat_of):
    short, long = _rows("yes", "yes " * 50)
    rules = _rules(chat, max_length=max(_rules(chat).lengths(short)) - 1)
    assert truncation.shortened(short, rules, 1) is not short
    assert truncation.shortened(long, rules, 1) is None
    for too_long in ("drop", "truncate-right"):  # its end is cut later, if at all
        other = dataclasses.replace(rules, too_long=too_long)
        assert truncation.shortened(long, other, 1) is long
    # A response that is to be written gets half of what is free at most.
    chat, (row,) = chat_of("llama3"), _rows(None)  # it has no system message of its own
    bare = max(_rules(chat).lengths(dataclasses.replace(row, prefix=())))
    rules = _rules(chat, max_length=bare + 20)
    assert bare < max(rules.lengths(truncation.shortened(row, rules, 1000))) <= bare + 10


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ({"prefix_file": "p.json"}, r"\(context\.prefix_file = p\.json\)"),
        ({"prefix_messages": ({"role": "user"},)}, r"\(context\.prefix_messages\)"),
        ({"history_as_prefix": True}, r"\(context\.history_as_prefix\)"),
        ({}, r"\(the rows' prefix_messages\)"),
    ],
)
def test_a_prefix_that_leaves_no_row_is_named_with_its_length(chat, context, expected):
    rows, context = _rows("yes", None), Context(**context)
    prefix = max(_rules(chat).lengths(rows[1])) - len(chat.prompt_ids(rows[0].turns))
    rules = _rules(chat, max_length=prefix, too_long="drop")
    expected = rf"data\.train .*{expected} has {prefix} tokens.*= {prefix}\."
    with pytest.raises(UserError, match=expected):
        truncation.require_room_beside_prefix("data.train", rows, rules, context)
    for fine, examples in (
        (dataclasses.replace(rules, max_length=prefix + 1), rows),
        (dataclasses.replace(rules, too_long="truncate-prefix"), rows),
        (rules, [*rows, *_rows("yes", prefix=())]),
    ):
        truncation.require_room_beside_prefix("data.train", examples, fine, context)


def test_a_row_longer_than_a_models_context_is_named(chat):
    rows = _rows("yes", "no", None)
    rules = _rules(chat, too_long="drop", max_length=999)
    student, teacher = rules.lengths(rows[2])

    def require(student_reads, teacher_reads, examples=rows, **changes):
        contexts = {
            "the student (a)": ContextLimit(student_reads, "a/config.json"),
            "the teacher (b)": ContextLimit(teacher_reads, "b/config.json"),
        }
        room, changed = ("rollout.max_new_tokens", 9), dataclasses.replace(rules, **changes)
        truncation.require_contexts(examples, changed, room, contexts, teacher_writes=True)

    require(student + 9, teacher + 9)
    require(None, None)
    with pytest.raises(UserError, match=rf"^rows:2: the teacher \(b\) has .* {teacher + 9} tokens"):
        require(None, teacher + 8)
    with pytest.raises(UserError, match=r"the student \(a\) .* with the response .*max_length=\d+"):
        require(student + 8, teacher + 9)
    require(student + 8, None, rows[:2])
    with pytest.raises(
        UserError, match=r"^rows:0: .*reads 9 at most \(b/config.json\).*truncate-pr"
    ):
        require(None, 9)
    # What data.max_length drops or cuts is not read.
    require(None, 9, rows[:2], max_length=teacher - 1)
    require(student + 8, None, rows[2:], max_length=teacher + 8)
    with pytest.raises(UserError, match=rf"^rows:0: the teacher \(b\) has to read {teacher - 1} "):
        require(None, 9, rows[:2], max_length=teacher - 1, too_long="truncate-right")


def test_a_teacher_at_a_server_has_to_find_room_for_what_it_writes(chat):
    """Whatever data.max_length is going to cut off again: the server does not know of it."""
    rows, rules = _rows(None), _rules(chat)
    _, prompt = rules.lengths(rows[0])

    def require(tokens, writes=True, rows=rows, max_length=prompt + 1):
        limit = ContextLimit(tokens - 1, f"max_model_len={tokens} of m", written=tokens)
        contexts = {"the student (a)": ContextLimit(None, ""), "the teacher (b)": limit}
        room, changed = ("rollout.max_new_tokens", 9), _rules(chat, max_length=max_length)
        truncation.require_contexts(rows, changed, room, contexts, teacher_writes=writes)

    require(prompt + 9)
    require(prompt + 8, rows=_rows("yes"))
    require(prompt + 8, writes=False)
    with pytest.raises(UserError, match=rf"{prompt} tokens and .* 9.*of m\): set rollout.*=8 "):
        require(prompt + 8)
    with pytest.raises(UserError, match=r"of m\): shorten the prefix"):
        require(prompt, max_length=prompt - 1)
