"""What teacher and student read of a row, and that they predict the same targets."""

import dataclasses
import json

import chat_templates as templates
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gkdjax.data.conversations import answers_of
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.template import is_plain
from gkdjax.data.views import RowStatus, ViewRules
from gkdjax.losses.topk import TokenTopK, TopKLogprobs
from gkdjax.types import Completion, Example, Message
from gkdjax.utils.errors import UserError

_words = st.text("abc user.\n🙂", min_size=1, max_size=8).map(str.strip).filter(bool)
_PREFIX = (Message("system", "The key is x."),)
_ASK = (Message("user", "?"),)


@st.composite
def _pairs_of_turns(draw):
    turns = []
    for _ in range(draw(st.integers(0, 2))):
        turns += [Message("user", draw(_words)), Message("assistant", draw(_words))]
    return tuple(turns)


@st.composite
def rows(draw):
    """(example with a prefix and a response, retained); roles alternate in both views."""
    system = (Message("system", draw(_words)),) if draw(st.booleans()) else ()
    pairs = draw(_pairs_of_turns())
    turns = (*draw(_pairs_of_turns()), Message("user", draw(_words)))
    retained = draw(st.sampled_from([0, len(pairs), 99]))
    return _row(turns, draw(_words), system + pairs), retained


def _row(turns=_ASK, response=None, prefix=(), tools=""):
    answer = None if response is None else Message("assistant", response)
    return Example("rows:7", 7, prefix, tuple(turns), answer, None, tools=tools)


def _rules(chat, teacher_chat=None, roles=("assistant",), pattern=None, span="message", **changes):
    changes = {"retained": 0, "max_length": 4096, "too_long": "drop"} | changes
    return ViewRules(
        chat, teacher_chat or chat, targets=TargetRules(roles, pattern, span), **changes
    )


def _completion(chat, text, finished=True, **cached):
    """Character by character, as no tokenizer would make it of the text."""
    ids = [i for character in text for i in chat.tokenize(character)[0]]
    ids = np.asarray(ids + [chat.stop_ids[0]] * finished, np.int32)
    return Completion(ids, finished, **cached)


def _pair(rules, example, completion=None):
    """A pair that is kept: its views predict its targets, each from one position before it."""
    pair, status = rules.pair(example, completion)
    assert status is RowStatus.KEPT
    _check(pair)
    return pair


def _check(pair):
    for view in (pair.student, pair.teacher):
        np.testing.assert_array_equal(view.ids[view.at + 1], pair.target_ids)
        assert view.ids.dtype == view.at.dtype == pair.target_ids.dtype == np.int32
        assert view.at.min() >= 0 and (np.diff(view.at) > 0).all()
        assert view.at[-1] + 2 == len(view.ids)  # nothing follows the last target


def _parts(chat, example, roles=("assistant",)):
    """The example, or one for each answer where the template treats the last one apart."""
    return [example] if chat.earlier_answers else answers_of(example, TargetRules(roles))


@settings(max_examples=60, deadline=None)
@given(row=rows(), roles=st.sampled_from([("assistant",), ("user",), ("user", "assistant")]))
def test_targets_are_the_same_in_both_views_and_none_is_of_the_prefix(chat, row, roles):
    # Llama 2 puts a blank before the first user's words, or line breaks after the system's: the
    # first word is another token then, which is refused: see below.
    assume(roles == ("assistant",) or chat.end_of_turn != "<eos>")
    example, retained = row
    said = ""
    for part in _parts(chat, example, roles):
        pair = _pair(_rules(chat, roles=roles, retained=retained), part)
        said += chat.decode(pair.target_ids)
        # Counted from the end, targets stand at the same places: so not one lies in the prefix.
        student, teacher = (len(v.ids) - v.at for v in (pair.student, pair.teacher))
        np.testing.assert_array_equal(student, teacher)
    messages = [*example.turns, example.answer]
    expected = "".join(m.content for m in messages if m.role in roles)
    assert said.replace(" ", "") == expected.replace(" ", "")  # Llama 2 puts blanks there


@settings(max_examples=60, deadline=None)
@given(row=rows(), answer=_words, finished=st.booleans())
def test_a_completion_follows_the_generation_prompts_as_it_is(chat, row, answer, finished):
    completion, retained = _completion(chat, answer, finished), row[1]
    example = _parts(chat, dataclasses.replace(row[0], answer=None))[-1]
    rules = _rules(chat, retained=retained)
    pair, prefix = _pair(rules, example, completion), example.prefix
    student, teacher = rules.prompts(example)
    for view, prompt, read in (
        (pair.student, student, prefix[-retained:] if retained else ()),
        (pair.teacher, teacher, prefix),
    ):
        np.testing.assert_array_equal(prompt, chat.prompt_ids(read + example.turns))
        np.testing.assert_array_equal(view.ids, np.concatenate([prompt, completion.ids]))
    # Its last targets are the completion: an end of turn is among them only if it was written.
    np.testing.assert_array_equal(pair.target_ids[-len(completion.ids) :], completion.ids)
    earlier = [m for m in example.turns[example.given :] if m.role == "assistant"]
    assert np.isin(pair.target_ids, chat.stop_ids).sum() == len(earlier) + finished


def test_turns_alone_can_hold_the_targets(chat):
    """An anchor row on all tokens: no response, no completion."""
    rules = _rules(chat, roles=("system", "user", "assistant"))
    example = _row([Message("system", "S."), Message("user", "a b")])
    for completion, expected in ((None, "S.ab"), (_completion(chat, "yes"), "S.abyes")):
        targets = _pair(rules, example, completion).target_ids
        assert chat.decode(targets).replace(" ", "") == expected


_LOOK = '[{"type":"function","function":{"name":"look"}}]'
_CALL = json.dumps({"tool_calls": [{"function": {"name": "look", "arguments": {}}}]})


def test_tools_and_calls_are_in_both_views_and_in_prompts(chat_of):
    chat = chat_of(templates.CALLS)
    turns = (*_ASK, Message("assistant", "", _CALL), Message("tool", "3"), Message("user", "so?"))
    example, rules = _row(turns, "It is 3.", _PREFIX, _LOOK), _rules(chat)
    pair = _pair(rules, example)
    call = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>'
    assert chat.decode(pair.target_ids, special=True) == f"{call}It is 3.<|im_end|>"
    for view, ids in zip((pair.student, pair.teacher), rules.prompts(example), strict=True):
        assert f"<tools>\n{json.dumps(json.loads(_LOOK)[0])}\n</tools>" in chat.decode(ids)
        np.testing.assert_array_equal(view.ids[: len(ids)], ids)


def test_a_row_is_described_as_it_is_read(chat_of):
    rules = _rules(chat_of("chatml"))
    pair = _pair(rules, _row(response="yes", prefix=(Message("system", "S" * 999),)))
    found = rules.described(pair)
    student = "<|im_start|>user\\n?<|im_end|>\\n<|im_start|>assistant\\n'; the teacher reads"
    assert student in found and "SSS ... SSS" in found and len(found) < 1200
    assert found.endswith(f"; learnt are {len(pair.target_ids)} tokens, 'yes<|im_end|>'")


_THINKS = "<think>\nEasy.\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "answers", "at_once"),
    [
        (templates.CALLS, ["yes", "no"], True),
        (templates.CALLS, [f"{_THINKS}yes", "no"], True),
        (templates.MAY_THINK, [f"{_THINKS}yes", f"{_THINKS}no"], False),
        (templates.STRIPS, [f"{_THINKS}yes", f"{_THINKS}no"], False),
        (templates.LATE, ["yes", "no"], False),  # its tools move to the last question
    ],
)
def test_a_row_is_divided_where_its_rendering_would_teach_something_else(
    chat_of, template, answers, at_once
):
    chat = chat_of(template)
    turns = (*_ASK, Message("assistant", answers[0]), Message("user", "so?"))
    row = _row(turns, answers[1], tools=_LOOK if template == templates.LATE else "")
    rules = _rules(chat)
    parts = answers_of(row, rules.targets)
    assert rules.learns_at_once(row, parts) is at_once
    assert not is_plain(row) or answers == ["yes", "no"]
    taught = [chat.tokenizer.decode(rules.pair(part, None)[0].target_ids) for part in parts]
    assert [one.strip() for one in taught] == [f"{said}{chat.end_of_turn}" for said in answers]


_YES = _row(response="yes")
_BLANK = (
    r"target 1 is 'Ġ' for the student and '<\|eot_id\|>' for the teacher \(.*<\|im_end\|>.*give"
)


@pytest.mark.parametrize(
    ("names", "row", "roles", "expected"),
    [
        # chatml keeps the blank at the end, llama3 trims it.
        (("chatml", "llama3"), _row(response="yes "), ("assistant",), f"differ.*; {_BLANK}"),
        (("llama2",), _row([Message("user", "s")], None, _PREFIX), ("user",), "target tokens diff"),
        (("refuses system",), _row(_ASK, "yes", _PREFIX), ("assistant",), "System role not supp"),
        (("bare",), _YES, ("user",), "the first token of all is a target"),
        (("gemma",), _YES, ("tool",), "no target tokens.* roles tool"),
    ],
)
def test_views_that_cannot_be_made_are_refused_by_row(chat_of, names, row, roles, expected):
    rules = _rules(*map(chat_of, names), roles=roles)
    with pytest.raises(UserError, match=f"^rows:7(, .*'s view)?: .*{expected}"):
        rules.pair(row, None)
    if roles == ("tool",):
        with pytest.raises(UserError, match=expected):
            rules.pair(row, _completion(chat_of("gemma"), "yes"))


@pytest.mark.parametrize("written", [True, False])
def test_a_long_row_is_dropped_or_loses_the_end_of_its_response(chat_of, written):
    chat = chat_of("gemma")
    example = _row(response="a.b.c.d.", prefix=_PREFIX)
    completion = _completion(chat, "a.b.c.d.") if written else None
    whole = _pair(_rules(chat), example, completion)
    length, targets = len(whole.teacher.ids), len(whole.target_ids)
    assert length > len(whole.student.ids)

    def at(max_length, too_long="truncate-right"):
        return _rules(chat, max_length=max_length, too_long=too_long).pair(example, completion)

    assert at(length)[1] is at(length, "drop")[1] is RowStatus.KEPT
    assert at(length - 1, "drop") == (None, RowStatus.DROPPED)
    for lost in range(1, targets):
        pair, status = at(length - lost)
        assert status is RowStatus.TRUNCATED and len(pair.teacher.ids) == length - lost
        assert len(pair.student.ids) == len(whole.student.ids) - lost
        np.testing.assert_array_equal(pair.target_ids, whole.target_ids[:-lost])
        _check(pair)
    assert at(length - targets) == at(1) == (None, RowStatus.DROPPED)


_TALK = (
    *(Message("user", "one?"), Message("assistant", "a yes b"), Message("user", "yes?")),
    *(Message("assistant", "no"), Message("user", "more?")),
)


@pytest.mark.parametrize(
    ("span", "roles", "expected"),
    [
        ("message", ("assistant",), ["a yes b", "yes"]),
        ("message", ("assistant", "user"), ["a yes b", "yes?", "yes"]),
        ("match", ("assistant",), ["yes", "yes"]),
        ("match", ("user",), ["yes"]),
    ],
)
def test_only_the_turns_that_say_it_are_targets(chat_of, span, roles, expected):
    chat = chat_of("gemma")
    pair = _pair(_rules(chat, None, roles, "yes", span), _row(_TALK, "yes", _PREFIX))
    end = chat.end_of_turn if span == "message" else ""
    found = chat.decode(pair.target_ids, special=True).replace(" ", "")
    assert found == "".join(f"{said}{end}" for said in expected).replace(" ", "")


@pytest.mark.parametrize("span", ["message", "match"])
def test_a_row_that_does_not_say_it_is_told_apart_from_one_without_the_role(chat_of, span):
    chat, row = chat_of("gemma"), _row(_TALK, "yes")
    for completion in (None, _completion(chat, "no")):
        rules = _rules(chat, None, ("assistant",), "never", span)
        assert rules.pair(row, completion) == (None, RowStatus.UNMATCHED)
    with pytest.raises(UserError, match="no message of the roles tool"):
        _rules(chat, None, ("tool",), "never", span).pair(row, None)


def test_what_was_kept_of_a_response_is_cut_to_what_is_learnt_of_it(chat_of):
    chat = chat_of("gemma")
    n = len(_completion(chat, "a yes b").ids)
    topk = TopKLogprobs(*(np.arange(n * 2).reshape(n, 2),) * 2, np.arange(n), 1.0)
    written = _completion(chat, "a yes b", cached=TokenTopK(topk, np.arange(n)))
    for rules, places in (
        (_rules(chat), range(n)),
        (_rules(chat, pattern="y.s", span="match"), range(2, 5)),
    ):
        cached = _pair(rules, _row(), written).cached
        assert cached.target_logprob.tolist() == [*places]
        np.testing.assert_array_equal(cached.topk.ids, topk.ids[places])
    rules = _rules(chat, None, ("assistant", "user"), "y|[?]", "match")
    assert _pair(rules, _row(), written).cached is None  # nobody predicted the user's turn
