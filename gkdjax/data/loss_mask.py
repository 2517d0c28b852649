"""Which messages are learnt, and how much of each: by role, and by what they say."""

import bisect
import dataclasses
import functools
import re

import numpy as np

from gkdjax.data.chat_template import Chat, Sought, Target, matches
from gkdjax.data.message_spans import thinks
from gkdjax.data.row_schema import TOOL_ROLES
from gkdjax.types import Completion, Example, Message


@dataclasses.dataclass(frozen=True)
class TargetRules:
    """What is a target; see `context.target_roles` and the two keys after it.

    Attributes:
      roles: only messages of these.
      pattern: a regular expression that has to be found in them; None: any text.
      span: "message": then all of the message with its end of turn; "match": only what the pattern
        matched, every time that it matched something.
      whole_responses: what somebody writes is learnt whatever it says: where only lengths count.
    """

    roles: tuple[str, ...]
    pattern: str | None = None
    span: str = "message"
    whole_responses: bool = False

    def of_message(self, message: Message) -> Target:
        """Nothing, the whole message, spans of characters of its content, or what is to be sought.

        A message with a thought, a tool call or the like is sought through as its template has it.
        """
        if message.role not in self.roles or message.role in TOOL_ROLES or not message.learn:
            return False
        if self.pattern is None:
            return True
        if message.role == "assistant" and (message.fields or thinks(message)):
            return Sought(self.pattern, self.span == "message")
        if self.span == "message":
            return re.search(self.pattern, message.content) is not None
        return matches(self.pattern, message.content)

    def of_turns(self, example: Example) -> tuple[Target, ...]:
        """The same for each of an example's turns; the given ones are never targets."""
        learnt = [self.of_message(turn) for turn in example.turns[example.given :]]
        return (False,) * example.given + tuple(learnt)

    def of_completion(self, completion: Completion, chat: Chat) -> np.ndarray:
        """Which of its tokens are targets: bool [n]. Nothing is tokenised again."""
        ids = completion.ids
        if self.whole_responses:
            return np.full(len(ids), "assistant" in self.roles)
        text = chat.decode(ids)
        said = self.of_message(Message("assistant", text))
        if isinstance(said, Sought):
            found = re.search(said.pattern, text) is not None
            said = found if said.whole else matches(said.pattern, text)
        if isinstance(said, bool):
            return np.full(len(ids), said)
        return _tokens_of(said, ids, chat)


def _tokens_of(spans: tuple[tuple[int, int], ...], ids: np.ndarray, chat: Chat) -> np.ndarray:
    """Flags of the tokens that hold any character of `spans` of the decoded text."""
    text, flags = chat.decode(ids), np.zeros(len(ids), bool)

    # Characters that stand after the first `count` tokens. A token may hold a part of a character:
    # until the rest has come it decodes to something that does not stand in the text.
    @functools.cache
    def complete(count: int) -> int:
        said = chat.decode(ids[:count])
        differing = (i for i, pair in enumerate(zip(said, text, strict=False)) if len({*pair}) > 1)
        return next(differing, min(len(said), len(text)))

    counts = range(len(ids) + 1)
    for start, end in spans:
        first = bisect.bisect_left(counts, start, key=complete)
        first -= complete(first) > start  # the token before it holds more than what comes before
        flags[first : bisect.bisect_left(counts, end, key=complete)] = True
    # Special tokens say nothing, and may stand before what does.
    return flags & ~np.isin(ids, chat.tokenizer.all_special_ids)
