"""Responses: which one is asked for, and which of them are learnt from."""

import dataclasses
import hashlib
from typing import NamedTuple

import numpy as np

from gkdjax.data.chat_template import Chat
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.views import RowStatus
from gkdjax.types import Completion, Message, Prompt


@dataclasses.dataclass(frozen=True)
class RolloutFilter:
    """Which responses are learnt from.

    Attributes:
      targets: something of the response has to be a target by them, if it is to be trained at all.
      max_retries: a response that is refused is written again at most so many times.
      max_new_tokens: the longest that it may be.
      shared: ids that are not below it are none of the student's; None: all are.
    """

    targets: TargetRules
    max_retries: int
    max_new_tokens: int
    shared: int | None = None

    def fate(self, completion: Completion, chat: Chat) -> RowStatus:
        """KEPT, EMPTY or UNMATCHED."""
        if len(completion.ids) == 0:
            return RowStatus.EMPTY
        if self.shared is not None and completion.ids.max() >= self.shared:
            return RowStatus.EMPTY
        trained = "assistant" in self.targets.roles
        if trained and not self.targets.of_completion(completion, chat).any():
            return RowStatus.UNMATCHED
        return RowStatus.KEPT


class RolloutRequest(NamedTuple):
    """One response that is wanted."""

    row: str  # the name of its row
    number: int  # 0.. of those of the row
    prompt: np.ndarray  # int32, the token ids of its writer's view
    prefix: tuple[Message, ...]  # of the row
    turns: tuple[Message, ...]  # of the row
    tools: str = ""  # of the row

    @property
    def prompt_digest(self) -> str:
        """What the prompt is known by from run to run."""
        return digest(np.asarray(self.prompt, np.int32).tobytes())

    def for_writer(self) -> Prompt:
        """What its writer is given."""
        return Prompt(self.row, self.prompt, self.prefix + self.turns, self.tools)

    def key(self) -> tuple:
        """What a line must have to be this one's."""
        return self.row, self.number, self.prompt_digest


class Rollout(NamedTuple):
    """The last response to a prompt, accepted or not, how many were refused in all, and whose."""

    completion: Completion
    refused: int
    author: str  # the writer's name


def digest(content: bytes) -> str:
    """64 bits: a response must never be taken for that of another prompt, among millions."""
    return hashlib.sha256(content).hexdigest()[:16]
