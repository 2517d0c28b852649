"""What teacher and student read of a row, and that they predict the same targets."""

import dataclasses
import json

import chat_templates as templates
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gkdjax.data.conversations import answers_apart, answers_of
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.message_spans import is_plain
from gkdjax.data.views import RowStatus, ViewRules
from gkdjax.losses import TopKLogprobs
from gkdjax.types import Completion, Example, Message, TokenTopK
from gkdjax.utils.errors import UserError

_words = st.text("abc user.\n🙂", min_size=1, max_size=8).map(str.strip).filter(bool)
_PREFIX = (Message("system", "The key is x."),)


@st.composite
def _pairs_of_turns(draw, least, most):
    turns = []
    for _ in range(draw(st.integers(least, most))):
        turns += [Message("user", draw(_words)), Message("assistant", draw(_words))]
    return tuple(turns)


@st.composite
def cases(draw):
    """(example with a response, prefix, retained); roles alternate in both views."""
    system = (Message("system", draw(_words)),) if draw(st.booleans()) else ()
    pairs = draw(_pairs_of_turns(0, 2))
    turns = (*draw(_pairs_of_turns(0, 2)), Message("user", draw(_words)))
    retained = draw(st.sampled_from([0, len(pairs), 99]))
    return _row(turns, draw(_words)), system + pairs, retained


def _row(turns, response=None, prefix=()):
    answer = None if response is None else Message("assistant", response)
    return Example("rows:7", 7, prefix, tuple(turns), answer, None)


def _view(example, chat, prefix=(), teacher_chat=None, **changes):
    completion = changes.pop("completion", None)
    example = dataclasses.replace(example, prefix=prefix)
    return _rules(chat, teacher_chat, **changes).pair(example, completion)


def _rules(chat, teacher_chat=None, **changes):
    settings_ = {
        "retained": 0,
        "targets": TargetRules(("assistant",)),
        "max_length": 4096,
        "too_long": "drop",
    }
    return ViewRules(chat, teacher_chat or chat, **{**settings_, **changes})


def _parts(chat, example, roles=("assistant",)):
    """The example, or one for each answer where the template treats the last one apart."""
    return [example] if chat.earlier_answers else answers_apart([example], "", TargetRules(roles))


def _completion(chat, text, finished=True):
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Completion(np.asarray(ids + [chat.stop_ids[0]] * finished, np.int32), finished)


def _read(chat, ids):
    return chat.decode(ids).replace(" ", "")  # Llama 2's template puts blanks around an answer


def _check(pair):
    """What holds for every pair: the views predict its targets, from one position before each."""
    for view in (pair.student, pair.teacher):
        np.testing.assert_array_equal(view.ids[view.at + 1], pair.target_ids)
        assert view.ids.dtype == view.at.dtype == pair.target_ids.dtype == np.int32
        assert view.at.min() >= 0 and (np.diff(view.at) > 0).all()
        assert view.at[-1] + 2 == len(view.ids)  # nothing follows the last target


@settings(max_examples=60, deadline=None)
@given(case=cases(), roles=st.sampled_from([("assistant",), ("user",), ("user", "assistant")]))
def test_targets_are_the_same_in_both_views_and_none_is_of_the_prefix(chat, case, roles):
    example, prefix, retained = case
    # Llama 2 puts a blank before the first user's words, or line breaks after the system's: the
    # first word is another token then, which is refused: see below.
    assume(roles == ("assistant",) or chat.end_of_turn != "<eos>")
    said = ""
    for part in _parts(chat, example, roles):
        pair, fate = _view(part, chat, prefix, retained=retained, targets=TargetRules(roles))
        assert fate is RowStatus.KEPT
        _check(pair)
        said += _read(chat, pair.target_ids)
        # Counted from the end, targets stand at the same places: so not one lies in the prefix.
        student, teacher = (len(v.ids) - v.at for v in (pair.student, pair.teacher))
        np.testing.assert_array_equal(student, teacher)
    messages = [*example.turns, Message("assistant", example.response)]
    expected = "".join(m.content for m in messages if m.role in roles)
    assert said == expected.replace(" ", "")


@settings(max_examples=60, deadline=None)
@given(case=cases(), answer=_words, finished=st.booleans())
def test_a_completion_follows_the_generation_prompts_as_it_is(chat, case, answer, finished):
    example, prefix, retained = case
    completion = _completion(chat, answer, finished)
    example = _parts(chat, dataclasses.replace(example, answer=None))[-1]
    pair, fate = _view(example, chat, prefix, retained=retained, completion=completion)
    assert fate is RowStatus.KEPT
    _check(pair)
    asked = _rules(chat, retained=retained).prompts(dataclasses.replace(example, prefix=prefix))
    for view, prompt in zip((pair.student, pair.teacher), asked, strict=True):
        np.testing.assert_array_equal(view.ids, np.concatenate([prompt, completion.ids]))
    # Its last targets are the completion: an end of turn is among them only if it was written.
    np.testing.assert_array_equal(pair.target_ids[-len(completion.ids) :], completion.ids)
    earlier = [m for m in example.turns[example.given :] if m.role == "assistant"]
    ends = np.isin(pair.target_ids, chat.stop_ids).sum()
    assert ends == len(earlier) + finished


def test_a_completion_is_not_tokenised_again(chat_of):
    """Ids that the tokenizer would never make of their text stay as they are."""
    chat = chat_of("chatml")
    letters = [chat.tokenizer.convert_tokens_to_ids(c) for c in "user"]
    assert chat.tokenizer("user", add_special_tokens=False)["input_ids"] != letters
    completion = Completion(np.asarray(letters, np.int32), finished=False)
    pair, _ = _view(_row([Message("user", "?")], "unused"), chat, _PREFIX, completion=completion)
    assert pair.target_ids.tolist() == letters


def test_student_reads_only_what_is_retained_of_the_prefix(chat_of):
    chat = chat_of("chatml")
    prefix = (*_PREFIX, Message("user", "Q"), Message("assistant", "A"))
    example = _row([Message("user", "?")])
    for retained, seen in ((0, ()), (2, prefix[1:]), (3, prefix), (9, prefix)):
        student, teacher = _rules(chat, retained=retained).prompts(
            dataclasses.replace(example, prefix=prefix)
        )
        np.testing.assert_array_equal(student, chat.prompt_ids(seen + example.turns))
        np.testing.assert_array_equal(teacher, chat.prompt_ids(prefix + example.turns))
        pair, _ = _view(example, chat, prefix, retained=retained, completion=_completion(chat, "y"))
        np.testing.assert_array_equal(pair.student.ids[:-2], student)
        np.testing.assert_array_equal(pair.teacher.ids[:-2], teacher)


def test_turns_alone_can_hold_the_targets(chat):
    """An anchor row on all tokens: no response, no completion."""
    example = _row([Message("system", "S."), Message("user", "a b")])
    pair, fate = _view(example, chat, targets=TargetRules(("system", "user", "assistant")))
    assert fate is RowStatus.KEPT
    _check(pair)
    assert _read(chat, pair.target_ids) == "S.ab"
    pair, _ = _view(
        example,
        chat,
        targets=TargetRules(("system", "user", "assistant")),
        completion=_completion(chat, "yes"),
    )
    _check(pair)
    assert _read(chat, pair.target_ids) == "S.abyes"


@pytest.mark.parametrize("completion", [True, False])
def test_a_row_without_a_target_is_an_error(chat, completion):
    example = _row([Message("user", "?")], "yes")
    written = _completion(chat, "yes") if completion else None
    with pytest.raises(UserError, match=r"rows:7: no target tokens.* roles tool"):
        _view(example, chat, completion=written, targets=TargetRules(("tool",)))


_LOOK = '[{"type":"function","function":{"name":"look"}}]'


def _calling(name="look"):
    fields = {"tool_calls": [{"function": {"name": name, "arguments": {}}}]}
    return Message("assistant", "", json.dumps(fields))


def test_tools_and_calls_are_in_both_views_and_in_prompts(chat_of):
    chat = chat_of(templates.CALLS)
    turns = (Message("user", "?"), _calling(), Message("tool", "3"), Message("user", "so?"))
    example = dataclasses.replace(_row(turns, "It is 3."), tools=_LOOK)
    pair, fate = _view(example, chat, _PREFIX)
    assert fate is RowStatus.KEPT
    call = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>'
    assert chat.tokenizer.decode(pair.target_ids) == f"{call}It is 3.<|im_end|>"
    _check(pair)
    prompts = _rules(chat).prompts(dataclasses.replace(example, prefix=_PREFIX))
    for view, prompt in zip((pair.student, pair.teacher), prompts, strict=True):
        tools = "<tools>\n" + json.dumps(json.loads(_LOOK)[0]) + "\n</tools>"
        assert tools in chat.tokenizer.decode(view.ids)
        np.testing.assert_array_equal(view.ids[: len(prompt)], prompt)
    row, answer = dataclasses.replace(example, answer=None), _completion(chat, "3")
    written, _ = _view(row, chat, _PREFIX, completion=answer)
    np.testing.assert_array_equal(written.teacher.ids, np.concatenate([prompts[1], answer.ids]))


def test_a_row_is_described_as_it_is_read(chat_of):
    chat = chat_of("chatml")
    pair, _ = _view(_row([Message("user", "?")], "yes"), chat, (Message("system", "S" * 999),))
    told = _rules(chat).described(pair)
    student = "<|im_start|>user\\n?<|im_end|>\\n<|im_start|>assistant\\n'; the teacher reads"
    assert student in told and "SSS ... SSS" in told and len(told) < 1200
    assert told.endswith(f"; learnt are {len(pair.target_ids)} tokens, 'yes<|im_end|>'")


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
    first, last = (Message("assistant", answer) for answer in answers)
    turns = (Message("user", "?"), first, Message("user", "so?"))
    tools = _LOOK if template == templates.LATE else ""
    row = dataclasses.replace(_row(turns, last.content), tools=tools)
    rules = _rules(chat)
    parts = answers_of(row, rules.targets)
    assert rules.learns_at_once(row, parts) is at_once
    assert not is_plain(row) or answers == ["yes", "no"]
    taught = [chat.tokenizer.decode(rules.pair(part, None)[0].target_ids) for part in parts]
    assert [one.strip() for one in taught] == [f"{said}{chat.end_of_turn}" for said in answers]


def test_views_that_tokenise_differently_are_an_error(chat_of):
    example = _row([Message("user", "?")], "yes ")  # chatml keeps the blank, llama3 trims it
    told = (
        r"rows:7: the target tokens differ.*; target 1 is 'Ġ' for the student and '<\|eot_id\|>' "
    )
    told += r"for the teacher.*ends a turn with <\|im_end\|>.*with <\|eot_id\|>"
    with pytest.raises(ValueError, match=told):
        _view(example, chat_of("chatml"), teacher_chat=chat_of("llama3"))


def test_a_target_whose_tokens_depend_on_the_prefix_is_an_error(chat_of):
    with pytest.raises(UserError, match=r"rows:7: the target tokens differ"):
        _view(
            _row([Message("user", "s")]), chat_of("llama2"), _PREFIX, targets=TargetRules(("user",))
        )


def test_a_template_error_names_row_and_view(chat_of):
    with pytest.raises(UserError, match=r"rows:7, teacher's view: .*System role not supported"):
        _view(_row([Message("user", "?")], "yes"), chat_of("refuses system"), _PREFIX)


def test_the_first_token_of_all_cannot_be_a_target(chat_of):
    with pytest.raises(UserError, match="rows:7, student's view: the first token of all"):
        _view(_row([Message("user", "?")], "yes"), chat_of("bare"), targets=TargetRules(("user",)))


@pytest.mark.parametrize("completion", [True, False])
def test_a_long_row_is_dropped_or_loses_the_end_of_its_response(chat_of, completion):
    chat = chat_of("gemma")
    example = _row([Message("user", "?")], "a.b.c.d.")
    written = _completion(chat, "a.b.c.d.") if completion else None
    whole, _ = _view(example, chat, _PREFIX, completion=written)
    length, targets = len(whole.teacher.ids), len(whole.target_ids)
    assert length > len(whole.student.ids)

    def at(max_length, too_long="truncate-right"):
        changes = {"max_length": max_length, "too_long": too_long, "completion": written}
        return _view(example, chat, _PREFIX, **changes)

    assert at(length)[1] is at(length, "drop")[1] is RowStatus.KEPT
    assert at(length - 1, "drop") == (None, RowStatus.DROPPED)
    for lost in range(1, targets):
        pair, fate = at(length - lost)
        assert fate is RowStatus.TRUNCATED and len(pair.teacher.ids) == length - lost
        assert len(pair.student.ids) == len(whole.student.ids) - lost
        np.testing.assert_array_equal(pair.target_ids, whole.target_ids[:-lost])
        _check(pair)
    assert at(length - targets) == (None, RowStatus.DROPPED)
    assert at(1) == (None, RowStatus.DROPPED)


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
    rules = TargetRules(roles, "yes", span)
    pair, fate = _view(_row(_TALK, "yes"), chat, _PREFIX, targets=rules)
    assert fate is RowStatus.KEPT
    _check(pair)
    end = chat.end_of_turn if span == "message" else ""
    raw = chat.tokenizer.decode(pair.target_ids, clean_up_tokenization_spaces=False)
    assert raw.replace(" ", "") == "".join(f"{said}{end}" for said in expected).replace(" ", "")


def test_a_row_that_does_not_say_it_is_told_apart_from_one_without_the_role(chat_of):
    chat = chat_of("gemma")
    for span in ("message", "match"):
        rules = TargetRules(("assistant",), "never", span)
        assert _view(_row(_TALK, "yes"), chat, targets=rules) == (None, RowStatus.UNMATCHED)
        assert _view(
            _row(_TALK, "yes"), chat, completion=_completion(chat, "no"), targets=rules
        ) == (
            None,
            RowStatus.UNMATCHED,
        )
        with pytest.raises(UserError, match="no message of the roles tool"):
            _view(_row(_TALK, "yes"), chat, targets=TargetRules(("tool",), "never", span))


def test_what_was_kept_of_a_response_is_cut_to_what_is_learnt_of_it(chat_of):
    chat = chat_of("gemma")
    plain = _completion(chat, "a yes b")
    n = len(plain.ids)
    topk = TopKLogprobs(*(np.arange(n * 2).reshape(n, 2),) * 2, np.arange(n), 1.0)
    written = dataclasses.replace(plain, kept=TokenTopK(topk, np.arange(n)))
    example = _row([Message("user", "?")])
    pair, _ = _view(example, chat, completion=written)
    np.testing.assert_array_equal(pair.kept.target_logprob, np.arange(n))
    pair, _ = _view(
        example, chat, completion=written, targets=TargetRules(("assistant",), "y.s", "match")
    )
    (places,) = np.nonzero(np.isin(plain.ids, pair.target_ids))
    assert 0 < len(places) < n and chat.decode(pair.target_ids).strip() == "yes"
    np.testing.assert_array_equal(pair.kept.target_logprob, places)
    np.testing.assert_array_equal(pair.kept.topk.ids, topk.ids[places])
    rules = TargetRules(("assistant", "user"), "y|[?]", "match")
    pair, _ = _view(example, chat, completion=written, targets=rules)
    assert pair.kept is None  # the user's turn was not written by anybody
