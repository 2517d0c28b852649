"""Which messages are targets, and which tokens of a written response."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdjax.data.chat_template import PatternTarget
from gkdjax.data.loss_mask import TargetRules
from gkdjax.types import Completion, Example, Message

_SAID = Message("assistant", "so: yes, yes")
_CALLS = _SAID._replace(fields='{"tool_calls":[]}')
_WHOLE = TargetRules(("assistant", "tool"))


def _match(pattern):
    return TargetRules(("assistant",), pattern, "match")


@pytest.mark.parametrize(
    ("rules", "message", "expected"),
    [
        (_WHOLE, _SAID, True),
        (_WHOLE, _SAID._replace(role="user"), False),
        (_WHOLE, _SAID._replace(learn=False), False),
        (_WHOLE, Message("tool", "3"), False),
        (_WHOLE, _CALLS, True),
        (TargetRules(("assistant",), "yes$"), _SAID, True),
        (TargetRules(("assistant",), "^yes"), _SAID, False),
        (_match("yes"), _SAID, ((4, 7), (9, 12))),
        (_match("e*"), _SAID, ((5, 6), (10, 11))),  # and nothing where it matches nothing
        (_match("no"), _SAID, ()),
        # What a template may write differently is searched for in what it writes.
        (_match("yes"), _CALLS, PatternTarget("yes", False)),
        (_match("yes"), Message("assistant", "</think>yes"), PatternTarget("yes", False)),
    ],
)
def test_a_message_is_a_target_by_role_weight_and_what_it_says(rules, message, expected):
    assert rules.of_message(message) == expected


def test_given_turns_are_no_targets():
    turns = (Message("user", "u"), _SAID, Message("user", "u"), _SAID)
    example = Example("rows:0", 0, (), turns, None, None, given=2)
    assert TargetRules(("assistant",)).of_turns(example) == (False, False, False, True)
    assert TargetRules(("user",)).of_turns(example) == (False, False, True, False)


@settings(max_examples=150, deadline=None)
@given(text=st.text("ab yes.\n\u00e9\U0001f642", min_size=1, max_size=12), data=st.data())
def test_spans_of_written_text_are_found_without_tokenising_it(chat_of, text, data):
    """Where the ids are the tokenizer's own, its offsets say which tokens it must be."""
    chat = chat_of("chatml")
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    tokens, offsets = chat.tokenize(text)
    ids = np.append(tokens, np.int32(chat.stop_ids[0]))
    expected = [b > start and a < end for a, b in offsets] + [False]
    # A pattern for this one place.
    before = f"(?s)(?<=^.{{{start}}})" if start else "(?s)^"
    found = _match(f"{before}.{{{end - start}}}").of_completion(Completion(ids, True), chat)
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("rules", "tokens", "expected"),
    [
        # No tokenizer would cut "user" into letters.
        (TargetRules(("assistant",), "use"), ("u", "s", "e", "r", "<eos>"), [1, 1, 1, 1, 1]),
        (TargetRules(("assistant",), "used"), ("u", "s", "e", "r", "<eos>"), [0, 0, 0, 0, 0]),
        (TargetRules(("user",)), ("u", "s", "e", "r", "<eos>"), [0, 0, 0, 0, 0]),
        (_match("se"), ("u", "s", "e", "r", "<eos>"), [0, 1, 1, 0, 0]),
        (TargetRules(("assistant",), "x", "match", True), ("u", "<eos>"), [1, 1]),
        # A special token before the match is no part of it.
        (_match("us"), ("<bos>", "u", "s", "<eos>"), [0, 1, 1, 0]),
    ],
)
def test_tokens_of_written_text_are_targets(chat_of, rules, tokens, expected):
    chat = chat_of("chatml")
    ids = np.asarray([chat.tokenizer.convert_tokens_to_ids(t) for t in tokens], np.int32)
    assert rules.of_completion(Completion(ids, True), chat).tolist() == list(map(bool, expected))
