"""Rows that are longer than data.max_length, or than what a model can read."""

import dataclasses

import pytest

from gkdjax.config import Context
from gkdjax.data import truncation
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.views import ViewRules
from gkdjax.types import ContextLimit, Example, Message
from gkdjax.utils.errors import UserError

_PREFIX = (
    Message("system", "a.b.c.d.e.f."),
    *(Message("user", "one?"), Message("assistant", "1")),
    *(Message("user", "two?"), Message("assistant", "2")),
)


def _rows(*responses, prefix=_PREFIX):
    return [
        Example(f"rows:{i}", i, prefix, (Message("user", "so?"),), answer, None)
        for i, answer in enumerate(r and Message("assistant", r) for r in responses)
    ]


def _rules(chat, **changes):
    rules = ViewRules(chat, chat, 0, TargetRules(("assistant",)), 4096, "truncate-prefix")
    return dataclasses.replace(rules, **changes)


@pytest.fixture
def chat(chat_of):
    return chat_of("chatml")


@pytest.mark.parametrize("too_long", ["truncate-prefix", "truncate-left"])
def test_rows_fit_with_the_response_that_they_have_or_may_get(chat, too_long, caplog):
    rows = _rows("yes", None)
    whole = [max(_rules(chat).lengths(row)) for row in rows]
    for i, room in ((0, 0), (1, 5)):
        row = [rows[i]]
        rules = _rules(chat, too_long=too_long, max_length=whole[i] + room)
        assert truncation.shortened("data.train", row, rules, 5) == (row, [], [])
        rules = dataclasses.replace(rules, max_length=whole[i] + room - 1)
        (shorter,), cut, dropped = truncation.shortened("data.train", row, rules, 5)
        assert shorter.prefix == (_PREFIX[0], *_PREFIX[3:])
        assert (cut, dropped) == ([f"rows:{i}"], [])
        lost = whole[i] - max(rules.lengths(shorter))
        assert (
            f"1 rows longer than data.max_length={rules.max_length} lost {lost} tok" in caplog.text
        )
    assert f"({too_long}): rows:1" in caplog.text


def test_a_row_that_does_not_fit_without_its_prefix_is_dropped(chat):
    rows = _rows("yes", "yes " * 50, None)
    rules = _rules(chat, max_length=max(_rules(chat).lengths(rows[0])) - 1)
    found = truncation.shortened("data.train", rows, rules, 1)
    assert [e.name for e in found.examples] == ["rows:0", "rows:2"]
    assert (found.cut, found.dropped) == (["rows:0"], ["rows:1"])
    # What cannot lose its beginning does not: its end is cut later, if at all.
    for too_long in ("drop", "truncate-right"):
        other = dataclasses.replace(rules, too_long=too_long)
        assert truncation.shortened("data.train", rows, other, 1) == (rows, [], [])


def test_a_response_gets_half_of_what_is_free_at_most(chat_of):
    chat = chat_of("llama3")  # it has no system message of its own
    (row,) = _rows(None)
    bare = max(_rules(chat).lengths(dataclasses.replace(row, prefix=())))
    rules = _rules(chat, max_length=bare + 20)
    ((shorter,), _, _) = truncation.shortened("data.train", [row], rules, 1000)
    assert bare < max(rules.lengths(shorter)) <= bare + 10


def test_what_the_student_retains_of_a_shorter_prefix_is_its_end(chat):
    (row,) = _rows("yes")
    for retained in (2, 99):
        rules = _rules(chat, retained=retained)
        rules = dataclasses.replace(rules, max_length=max(rules.lengths(row)) - 1)
        ((shorter,), _, _) = truncation.shortened("data.train", [row], rules, 5)
        pair, _ = rules.pair(shorter, None)
        read = chat.decode(pair.student.ids)
        assert "two?" in read and "one?" not in read and ("a.b" in read) == (retained == 99)


@pytest.mark.parametrize(
    ("context", "told"),
    [
        ({"prefix_file": "p.json"}, r"\(context\.prefix_file = p\.json\)"),
        ({"prefix_messages": ({"role": "user"},)}, r"\(context\.prefix_messages\)"),
        ({"history_as_prefix": True}, r"\(context\.history_as_prefix\)"),
        ({}, r"\(the rows' prefix_messages\)"),
    ],
)
def test_a_prefix_that_leaves_no_row_is_named_with_its_length(chat, context, told):
    rows = _rows("yes", None)
    rules = _rules(chat)
    prompt = len(chat.prompt_ids(rows[0].turns))
    prefix = max(rules.lengths(rows[1])) - prompt
    rules = _rules(chat, max_length=prefix, too_long="drop")
    with pytest.raises(UserError, match=rf"data\.train .*{told} has {prefix} tokens.*= {prefix}\."):
        truncation.require_room_beside_prefix("data.train", rows, rules, Context(**context))
    for fine, examples in (
        (dataclasses.replace(rules, max_length=prefix + 1), rows),
        (dataclasses.replace(rules, too_long="truncate-prefix"), rows),
        (rules, [*rows, *_rows("yes", prefix=())]),
    ):
        truncation.require_room_beside_prefix("data.train", examples, fine, Context(**context))


def test_a_row_longer_than_a_models_context_is_named(chat):
    rows = _rows("yes", "no", None)
    rules = _rules(chat, too_long="drop", max_length=999)
    student, teacher = rules.lengths(rows[2])

    def require(student_reads, teacher_reads, examples=rows, **changes):
        contexts = {
            "the student (a)": ContextLimit(student_reads, "a/config.json"),
            "the teacher (b)": ContextLimit(teacher_reads, "b/config.json"),
        }
        changed = dataclasses.replace(rules, **changes)
        room = "rollout.max_new_tokens", 9
        truncation.require_contexts(examples, changed, room, contexts, teacher_writes=True)

    require(student + 9, teacher + 9)
    require(None, None)
    with pytest.raises(UserError, match=rf"^rows:2: the teacher \(b\) has .* {teacher + 9} tokens"):
        require(None, teacher + 8)
    with pytest.raises(UserError, match=r"the student \(a\) .* with the response .*max_length=\d+"):
        require(student + 8, teacher + 9)
    require(student + 8, None, rows[:2])
    with pytest.raises(UserError, match=r"^rows:0: .*truncate-prefix"):
        require(None, 9)
    # What data.max_length drops or cuts is not read.
    require(None, 9, rows[:2], max_length=teacher - 1)
    require(student + 8, None, rows[2:], max_length=teacher + 8)
    with pytest.raises(UserError, match=rf"^rows:0: the teacher \(b\) has to read {teacher - 1} "):
        require(None, 9, rows[:2], max_length=teacher - 1, too_long="truncate-right")
    with pytest.raises(UserError, match=r"reads 9 at most \(b/config.json\)"):
        require(None, 9)


def test_who_writes_at_a_server_has_to_find_room_there(chat):
    """Whatever data.max_length is going to cut off again: the server does not know of it."""
    (row,) = _rows(None)
    rules = _rules(chat)
    _, prompt = rules.lengths(row)

    def require(tokens, writes=True, rows=(row,), max_length=prompt + 1):
        limit = ContextLimit(tokens - 1, f"max_model_len={tokens} of m", written=tokens)
        contexts = {"the student (a)": ContextLimit(None, ""), "the teacher (b)": limit}
        changed = dataclasses.replace(rules, max_length=max_length)
        room = "rollout.max_new_tokens", 9
        truncation.require_contexts(rows, changed, room, contexts, teacher_writes=writes)

    require(prompt + 9)
    require(prompt + 8, rows=_rows("yes"))
    require(prompt + 8, writes=False)
    with pytest.raises(UserError, match=rf"{prompt} tokens and .* 9.*of m\): set rollout.*=8 "):
        require(prompt + 8)
    with pytest.raises(UserError, match=r"of m\): shorten the prefix"):
        require(prompt, max_length=prompt - 1)
