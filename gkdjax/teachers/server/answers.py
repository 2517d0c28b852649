"""What a server is asked and what it answers, whatever dialect it speaks.

Shape letters: T tokens of a text, n targets, K top-k entries. All arrays are NumPy's.
"""

import dataclasses

import numpy as np

from gkdjax.losses.topk import TopKLogprobs
from gkdjax.types import Message, SamplingParams


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """Asks what the teacher predicts at some positions of a text."""

    name: str  # of the row, for errors
    ids: np.ndarray  # int32 [T], no padding
    at: np.ndarray  # int32 [n], rising: target j stands at at[j] + 1 < T
    top_k: int

    @property
    def target_ids(self) -> np.ndarray:
        """int32 [n]."""
        return self.ids[self.at + 1]


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """Asks for a response to a prompt, and what the teacher predicted at each of its tokens."""

    name: str  # of the row, for errors
    ids: np.ndarray  # int32 [T], no padding
    messages: tuple[Message, ...]  # the same prompt, for servers that take no ids
    sampling: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    top_k: int
    template_kwargs: dict = dataclasses.field(default_factory=dict)  # for the same servers
    tools: str = ""  # JSON list, for the same servers; "": none


Request = ScoreRequest | SampleRequest


@dataclasses.dataclass(frozen=True)
class TeacherAnswer:
    """The answer to either request: target tokens, and what the teacher predicts where they stand.

    Natural logs of probabilities under the teacher's whole vocabulary, at temperature 1.
    """

    target_ids: np.ndarray  # int32 [n]; of a sample, the response, its stop id included
    target_logprob: np.ndarray  # float32 [n]
    top_ids: np.ndarray  # int32 [n,K], best first; any id where absent
    top_logprobs: np.ndarray  # float32 [n,K]; -inf where absent
    tail_logprob: np.ndarray  # float32 [n], log(1 - P), at least log(losses.topk.EPS)
    finished: bool = False  # a sample whose last token is a stop id
    unmapped: int = 0  # entries among the best K without an id here; their mass is in the tail
    lost: bool = False  # a sample without a usable response: n is 0
    unreadable: str = ""  # which token of a lost sample has no id here; not stored

    @property
    def topk(self) -> TopKLogprobs:
        """[n,K]."""
        return TopKLogprobs(self.top_ids, self.top_logprobs, self.tail_logprob)

    def rows(self, which: slice) -> "TeacherAnswer":
        """The same about some of the targets."""
        cut = {k: v[which] for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return dataclasses.replace(self, finished=False, **cut)


def lost_sample(top_k: int, unmapped: int = 0, unreadable: str = "") -> TeacherAnswer:
    """An answer without any target."""
    ids, logprobs = np.zeros((0, top_k), np.int32), np.zeros((0, top_k), np.float32)
    none = np.zeros(0, np.float32)
    return TeacherAnswer(
        *(none.astype(np.int32), none, ids, logprobs, none),
        unmapped=unmapped,
        lost=True,
        unreadable=unreadable,
    )
