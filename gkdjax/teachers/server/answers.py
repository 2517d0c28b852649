"""What a server is asked and what comes back, whatever dialect it speaks.

Shape letters: T tokens that it reads, n target tokens, K top-k entries. NumPy throughout: nothing
of this happens on a device.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gkdjax.losses import TopKLogprobs
from gkdjax.losses.topk import EPS
from gkdjax.types import Message, SamplingParams, TokenTopK
from gkdjax.utils.errors import WrongAnswer

MOST_MASS = 1.0 + 1e-3  # of K probabilities; more cannot be rounding


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """What does the teacher predict at these positions of these ids?"""

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
    """A response to this prompt, and what the teacher predicted where it drew its tokens."""

    name: str  # of the row, for errors
    ids: np.ndarray  # int32 [T], no padding
    messages: tuple[Message, ...]  # the same prompt, for servers that take no ids
    sampling: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    top_k: int
    template_kwargs: dict = dataclasses.field(default_factory=dict)  # beside the messages
    tools: str = ""  # JSON list, for the same servers; "": none


Request = ScoreRequest | SampleRequest


@dataclasses.dataclass(frozen=True)
class TeacherAnswer:
    """To either request: the target tokens and what the teacher says about them.

    Natural logs of probabilities under the teacher's whole vocabulary, at temperature 1.
    """

    target_ids: np.ndarray  # int32 [n]; of a sample, the response, its stop id included
    target_logprob: np.ndarray  # float32 [n]
    top_ids: np.ndarray  # int32 [n,K], best first; any id where absent
    top_logprobs: np.ndarray  # float32 [n,K]; -inf where absent
    tail_logprob: np.ndarray  # float32 [n], log(1 - P), at least log(EPS)
    finished: bool = False  # of a sample: its last token is a stop id
    unmapped: int = 0  # entries among the best K that are no id of ours; their mass is in the tail
    lost: bool = False  # of a sample: a drawn token is no id of ours, so there is no response
    unreadable: str = ""  # of a lost one: what names no id; not stored

    def rows(self, which: slice) -> "TeacherAnswer":
        """Some of the targets, as if they had been all that was asked for."""
        arrays = ("target_ids", "target_logprob", "top_ids", "top_logprobs", "tail_logprob")
        cut = {name: getattr(self, name)[which] for name in arrays}
        return dataclasses.replace(self, finished=False, **cut)

    def kept(self) -> TokenTopK:
        """The same as a completion keeps it."""
        topk = TopKLogprobs(self.top_ids, self.top_logprobs, self.tail_logprob)
        return TokenTopK(topk, self.target_logprob)


def lost_sample(top_k: int, unmapped: int, unreadable: str = "") -> TeacherAnswer:
    """An answer to a sample request whose text cannot be used, or of which there is none."""
    none, no_rows = np.zeros(0, np.float32), np.zeros((0, top_k))
    ids = none.astype(np.int32)
    tops = no_rows.astype(np.int32), no_rows.astype(np.float32)
    return TeacherAnswer(
        ids, none, *tops, none, unmapped=unmapped, lost=True, unreadable=unreadable
    )


@dataclasses.dataclass(frozen=True)
class Position:
    """What a server says about one token: its own logprob, and the best ones by id."""

    target_id: int
    target_logprob: float
    best: dict[int, float]  # id -> logprob; may hold the target beside the best K, or too many
    unmapped: int = 0  # entries that are no id of ours


def collect(
    positions: Sequence[Position],
    *,
    top_k: int,
    vocab_size: int,
    name: str,
    finished: bool = False,
) -> TeacherAnswer:
    """Checks what a server says of each target and makes it a `TeacherAnswer`.

    Of the best K those whose id is not below `vocab_size` are dropped and counted; they are what a
    larger embedding has beside the same tokenizer, and have next to no mass. A logprob that stands
    for -inf becomes it.

    Args:
      positions: one a target.
      top_k: K; of more entries the best K are kept.
      vocab_size: of the ids that student and teacher have in common.
      name: of the row, for errors.
      finished: of a sample.

    Raises:
      WrongAnswer: a target is outside the vocabulary; a logprob is not a number or above 0, or
        the target has two; the mass is above 1; a target that is not among the best is more
        probable than one of them; or ids beyond the vocabulary have real mass.
    """
    n = len(positions)
    ids, logprobs = np.zeros((n, top_k), np.int32), np.full((n, top_k), -np.inf, np.float32)
    tail = np.zeros(n, np.float32)
    unmapped = 0
    for j, position in enumerate(positions):
        if not 0 <= position.target_id < vocab_size:
            raise WrongAnswer(f"{name}, target {j} of {n}: id {position.target_id} is none of ours")
        best = _checked(position, top_k, f"{name}, target {j} of {n}")
        best = sorted(best.items(), key=lambda entry: (-entry[1], entry[0]))[:top_k]
        ours = [(i, logprob) for i, logprob in best if 0 <= i < vocab_size]
        beyond = [(i, logprob) for i, logprob in best if not 0 <= i < vocab_size]
        _check_beyond(beyond, vocab_size, f"{name}, target {j} of {n}")
        unmapped += position.unmapped + len(beyond)
        if ours:
            ids[j, : len(ours)], logprobs[j, : len(ours)] = zip(*ours, strict=True)
        tail[j] = tail_logprob([logprob for _, logprob in ours])
    return TeacherAnswer(
        np.asarray([position.target_id for position in positions], np.int32),
        np.asarray([_logprob(position.target_logprob) for position in positions], np.float32),
        ids,
        logprobs,
        tail,
        finished=finished,
        unmapped=unmapped,
    )


def tail_logprob(logprobs: Sequence[float]) -> float:
    """log(1 - P) in float64, of what the server sent in float32: floored at log(EPS)."""
    mass = float(np.sum(np.exp(np.asarray(logprobs, np.float64))))
    return float(np.log(max(1.0 - mass, EPS)))


_LEAST = -9999.0  # nats; what servers write for -inf, which JSON does not have
_MOST_BEYOND = 0.01  # probability; the rows of an embedding that no token uses have far less
_ROUNDING = 1e-3  # nats; a logprob is at most 0, but for rounding


def _logprob(said: float) -> float:
    return -np.inf if said <= _LEAST else min(said, 0.0)


def _checked(position: Position, top_k: int, where: str) -> dict[int, float]:
    own = position.target_id, position.target_logprob
    for i, logprob in (own, *position.best.items()):
        if np.isnan(logprob) or logprob == np.inf:
            raise WrongAnswer(f"{where}: the logprob of id {i} is {logprob}")
        if logprob > _ROUNDING:
            raise WrongAnswer(f"{where}: the logprob of id {i} is {logprob}, a probability above 1")
    in_best = position.best.get(position.target_id)
    if in_best is not None and abs(_logprob(in_best) - _logprob(own[1])) > _ROUNDING:
        raise WrongAnswer(
            f"{where}: id {own[0]} is the target and has the logprob {own[1]}, but {in_best} among"
            " the best"
        )
    best = {i: _logprob(logprob) for i, logprob in position.best.items() if logprob > _LEAST}
    mass = float(np.sum(np.exp(list(best.values()))))
    if mass > MOST_MASS:
        raise WrongAnswer(f"{where}: {len(best)} tokens have a probability of {mass:.4f} together")
    left_out = position.target_id not in best and len(best) >= top_k
    if left_out and position.target_logprob > min(best.values()) + _ROUNDING:
        raise WrongAnswer(
            f"{where}: id {position.target_id} is the target, has the logprob"
            f" {position.target_logprob:.4f}, and is not among the best {len(best)}, of which the"
            f" last has {min(best.values()):.4f}"
        )
    return best


def _check_beyond(beyond: Sequence[tuple[int, float]], vocab_size: int, where: str) -> None:
    for i, logprob in beyond:
        if np.exp(logprob) > _MOST_BEYOND:
            raise WrongAnswer(
                f"{where}: the teacher gives a probability of {np.exp(logprob):.3f} to id {i},"
                f" which is not below {vocab_size}: its vocabulary is another one"
            )
