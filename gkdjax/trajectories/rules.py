"""Responses: who writes them, and which of them are accepted."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gkdjax.data.chat import Chat
from gkdjax.data.targets import TargetRules
from gkdjax.data.views import Fate
from gkdjax.types import Prompt, Trajectory

Writer = Callable[[Sequence[Prompt], Sequence[int]], list[Trajectory]]  # (prompts, seeds)


class Author(NamedTuple):
    """Somebody who writes responses."""

    name: str  # "student", or the teacher's description
    write: Writer


@dataclasses.dataclass(frozen=True)
class ResponseRules:
    """Which responses are learnt from.

    Attributes:
      targets: something of the response has to be a target by them, if it is to be trained at all.
      max_refills: a response that is refused is written again at most so many times.
      max_new_tokens: the longest that it may be.
      shared: ids that are not below it are none of the student's; None: all are.
    """

    targets: TargetRules
    max_refills: int
    max_new_tokens: int
    shared: int | None = None

    def fate(self, trajectory: Trajectory, chat: Chat) -> Fate:
        """KEPT, EMPTY or UNMATCHED."""
        if len(trajectory.ids) == 0:
            return Fate.EMPTY
        if self.shared is not None and trajectory.ids.max() >= self.shared:
            return Fate.EMPTY
        trained = "assistant" in self.targets.roles
        if trained and not self.targets.of_trajectory(trajectory, chat).any():
            return Fate.UNMATCHED
        return Fate.KEPT


class Written(NamedTuple):
    """The last response to a prompt, accepted or not, how many were refused in all, and whose."""

    trajectory: Trajectory
    refused: int
    author: str  # the author's name


def write_accepted(
    author: Author,
    prompts: Sequence[Prompt],
    seed: Callable[[int, int], int],
    rules: ResponseRules,
    chat: Chat,
) -> list[Written]:
    """A response to each prompt; one that is refused is written again, up to the rules' bound.

    Args:
      author: who writes.
      prompts: of the author's view.
      seed: (index of the prompt, attempt from 0) -> seed.
      rules: what is accepted.
      chat: the author's.
    """
    refused, trajectories = [0] * len(prompts), [None] * len(prompts)
    places = list(range(len(prompts)))
    for attempt in range(rules.max_refills + 1):
        if not places:
            break
        again = author.write([prompts[i] for i in places], [seed(i, attempt) for i in places])
        for i, trajectory in zip(places, again, strict=True):
            trajectories[i] = trajectory
        places = [i for i in places if rules.fate(trajectories[i], chat) is not Fate.KEPT]
        for i in places:
            refused[i] += 1
    return [Written(t, n, author.name) for t, n in zip(trajectories, refused, strict=True)]
