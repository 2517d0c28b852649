"""Responses: who writes them, and which of them are accepted."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from gkdjax.data.chat_template import Chat
from gkdjax.data.responses import RolloutFilter
from gkdjax.data.views import RowStatus
from gkdjax.types import Prompt, Trajectory

Writer = Callable[[Sequence[Prompt], Sequence[int]], list[Trajectory]]  # (prompts, seeds)


class Generator(NamedTuple):
    """Somebody who writes responses."""

    name: str  # "student", or the teacher's description
    write: Writer


class Rollout(NamedTuple):
    """The last response to a prompt, accepted or not, how many were refused in all, and whose."""

    trajectory: Trajectory
    refused: int
    author: str  # the author's name


def write_accepted(
    author: Generator,
    prompts: Sequence[Prompt],
    seed: Callable[[int, int], int],
    rules: RolloutFilter,
    chat: Chat,
) -> list[Rollout]:
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
        places = [i for i in places if rules.fate(trajectories[i], chat) is not RowStatus.KEPT]
        for i in places:
            refused[i] += 1
    return [Rollout(t, n, author.name) for t, n in zip(trajectories, refused, strict=True)]
