"""Which messages are targets, and which tokens of a written response."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdjax.data.chat_template import PatternTarget
from gkdjax.data.loss_mask import TargetRules
from gkdjax.types import Completion, Example, Message

_SAID = Message("assistant", "so: yes, yes")


def _match(pattern):
    return TargetRules(("assistant",), pattern, "match")


@pytest.mark.parametrize(
    ("pattern", "span", "expected"),
    [
        (None, "message", True),
        ("yes$", "message", True),
        ("^yes", "message", False),
        ("yes", "match", ((4, 7), (9, 12))),
        ("e*", "match", ((5, 6), (10, 11))),  # and nothing where it matches nothing
        ("no", "match", ()),
    ],
)
def test_a_message_is_a_target_by_role_and_by_what_it_says(pattern, span, expected):
    rules = TargetRules(("assistant",), pattern, span)
    assert rules.of_message(_SAID) == expected
    assert rules.of_message(_SAID._replace(role="user")) is False


def test_results_of_tools_and_messages_of_no_weight_are_no_targets():
    rules = TargetRules(("assistant", "tool"))
    assert rules.of_message(Message("tool", "3")) is False
    assert rules.of_message(_SAID._replace(learn=False)) is False
    # What a template may write otherwise than it stands is sought there.
    for odd in (_SAID._replace(fields='{"tool_calls":[]}'), Message("assistant", "</think>yes")):
        assert rules.of_message(odd) is True
        assert _match("yes").of_message(odd) == PatternTarget("yes", False)


def test_given_turns_are_no_targets():
    turns = (Message("user", "u"), _SAID, Message("user", "u"), _SAID)
    example = Example("rows:0", 0, (), turns, None, None, given=2)
    assert TargetRules(("assistant",)).of_turns(example) == (False, False, False, True)
    assert TargetRules(("user",)).of_turns(example) == (False, False, True, False)


_TEXT = st.text("ab yes.\n\u00e9\U0001f642", min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(text=_TEXT, data=st.data())
def test_spans_of_written_text_are_found_without_tokenising_it(chat_of, text, data):
    """Where the ids are the tokenizer's own, its offsets say which tokens it must be."""
    chat = chat_of("chatml")
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    encoded = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray([*encoded["input_ids"], chat.stop_ids[0]], np.int32)
    expected = [b > start and a < end for a, b in encoded["offset_mapping"]] + [False]
    # A pattern for this one place.
    before = f"(?s)(?<=^.{{{start}}})" if start else "(?s)^"
    found = _match(f"{before}.{{{end - start}}}").of_completion(Completion(ids, True), chat)
    assert found.tolist() == expected


def test_written_text_is_a_target_as_a_whole_or_not_at_all(chat_of):
    chat = chat_of("chatml")
    letters = [chat.tokenizer.convert_tokens_to_ids(c) for c in "user"]  # no tokenizer's way
    written = Completion(np.asarray([*letters, chat.stop_ids[0]], np.int32), True)
    assert TargetRules(("assistant",), "use").of_completion(written, chat).tolist() == [True] * 5
    assert not TargetRules(("assistant",), "used").of_completion(written, chat).any()
    assert not TargetRules(("user",)).of_completion(written, chat).any()
    assert _match("se").of_completion(written, chat).tolist() == [False, True, True, False, False]
    whole = TargetRules(("assistant",), "used", "match", whole_responses=True)
    assert whole.of_completion(written, chat).all()


def test_a_special_token_before_the_match_is_no_part_of_it(chat_of):
    chat = chat_of("chatml")
    ids = [chat.tokenizer.convert_tokens_to_ids(t) for t in ("<bos>", "u", "s", "<eos>")]
    written = Completion(np.asarray(ids, np.int32), True)
    assert _match("us").of_completion(written, chat).tolist() == [False, True, True, False]
