"""Decides which messages are learnt, and how much of each: by role, and by a pattern."""

import bisect
import dataclasses
import functools

import numpy as np

from gkdjax.data.chat_template import Chat, PatternTarget, Spans, Target
from gkdjax.data.row_schema import TOOL_ROLES
from gkdjax.data.template import thinks
from gkdjax.types import Completion, Example, Message


@dataclasses.dataclass(frozen=True)
class TargetRules:
    """Decides what is a target; see `context.target_roles` and the two keys after it."""

    roles: tuple[str, ...]
    pattern: str | None = None  # must be found in the message; None: any text
    span: str = "message"  # with its end of turn; or "match": only what is matched
    whole_responses: bool = False  # completions are targets whatever their text: for lengths

    def of_message(self, message: Message) -> Target:
        if message.role not in self.roles or message.role in TOOL_ROLES or not message.learn:
            return False
        if self.pattern is None:
            return True
        target = PatternTarget(self.pattern, self.span == "message")
        if message.role == "assistant" and (message.fields or thinks(message)):
            return target  # to be searched for in what the template makes of the message
        return target.resolve(message.content)

    def of_turns(self, example: Example) -> tuple[Target, ...]:
        learnt = [self.of_message(turn) for turn in example.turns[example.given :]]
        return (False,) * example.given + tuple(learnt)

    def of_completion(self, completion: Completion, chat: Chat) -> np.ndarray:
        """Which of its tokens are targets: bool [n]. Nothing is tokenised again."""
        ids, target = completion.ids, "assistant" in self.roles
        if target and self.pattern is not None and not self.whole_responses:
            target = PatternTarget(self.pattern, self.span == "message").resolve(chat.decode(ids))
        if isinstance(target, bool):
            return np.full(len(ids), target)
        return _tokens_of(target, ids, chat)


def _tokens_of(spans: Spans, ids: np.ndarray, chat: Chat) -> np.ndarray:
    """Flags the tokens that hold any character of `spans` of the decoded text."""
    text, flags = chat.decode(ids), np.zeros(len(ids), bool)

    @functools.cache
    def complete(count: int) -> int:
        """Characters of the text that the first `count` tokens hold whole.

        A token may hold a part of a character, which decodes to something else on its own.
        """
        part = chat.decode(ids[:count])
        differing = (i for i, (a, b) in enumerate(zip(part, text, strict=False)) if a != b)
        return next(differing, min(len(part), len(text)))

    counts = range(len(ids) + 1)
    for start, end in spans:
        first = bisect.bisect_left(counts, start, key=complete)
        first -= complete(first) > start  # the token before it reaches into the span
        flags[first : bisect.bisect_left(counts, end, key=complete)] = True
    # Special tokens decode to nothing, and may stand before the span.
    return flags & ~np.isin(ids, chat.tokenizer.all_special_ids)
