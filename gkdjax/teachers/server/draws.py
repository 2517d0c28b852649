"""Are tokens drawn from the distributions that their server reports? Told with exact odds.

A token drawn at temperature 1 has a mean negative logprob equal to the entropy. How far the mean of
some dozens may be from it is not left to a variance, which has tails: for a few ways in which
servers go wrong the probability of what was drawn is divided by what the server reports. If the
report is true, each such ratio, multiplied over tokens that follow each other, has the mean 1,
whatever the model, and so has the mean of them all: it exceeds a million in less than one of a
million servers, however long one goes on (Ville's inequality).

Letters: C categories: the best K - 1 ids without the stop ids, and all others as one. The K-th may
be there only because it was drawn, and a stop id is not shown by every server.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gkdjax.teachers.server.answers import SampleRequest, TeacherAnswer

ODDS = 1e6

_DOUBT = (
    100.0  # odds from which on more tokens are asked for; that may be done as often as one likes
)
_LEAST = 1e-9  # of a category's probability

_POWERS = (5.0, 2.0, 1.25, 0.8, 0.5)  # of the probabilities: 1 / temperature
_TOLD_APART = (1 / 0.7, 1 / 1.3)  # powers that so many tokens are to show: temperatures in use
_AVOIDED = (0.5, 0.15)  # factors for tokens that were read or written before
_NUCLEUS, _CUT = 0.9, 0.02  # a cut, and the factor for what is beyond
_COLD = (
    "it draws greedily, at a lower temperature, or only from the best (top_p, top_k, min_p),"
    " whatever it is asked for"
)
_HOT = (
    "it draws at a higher temperature, whatever it is asked for, or from something else: another"
    " model, or what a grammar leaves"
)
_PENALTY = "it avoids tokens that it has read or written: a repetition penalty"
_KINDS = (*[_COLD if power > 1 else _HOT for power in _POWERS], *[_PENALTY] * 2, _HOT, _COLD, _COLD)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One token, and what it was drawn from."""

    p_C: np.ndarray  # float64, sums to 1
    own: int  # the category of the token
    seen_C: np.ndarray  # bool: ids that stand in the text before

    @property
    def each_C(self) -> np.ndarray:
        """The probability of one token; of others half the last one's."""
        return np.append(self.p_C[:-1], self.p_C[:-1].min(initial=1.0) / 2)

    def at_power(self, power: float) -> np.ndarray:
        """[C], what a server draws from at temperature 1 / power."""
        weights_C = self.p_C * self.each_C ** (power - 1.0)
        return weights_C / weights_C.sum()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of some tokens.

    Attributes:
      caught: an honest server has this once in a million times.
      fine: nothing speaks against them, and a greedy server would have been caught by as many.
      enough: so would be, on the average, one that draws at temperature 0.7 or 1.3.
      surprise: mean negative logprob, nats; of tokens that are none of the best K, about.
      entropy: the mean that it should have, nats.
      kind: what explains it best, for people.
    """

    caught: bool
    fine: bool
    enough: bool
    surprise: float
    entropy: float
    kind: str


def tokens_of(request: SampleRequest, answer: TeacherAnswer) -> list[Drawn]:
    """The tokens of an answer that was asked for at temperature 1 without cuts; stop ids have none.

    Args:
      request: that it answers.
      answer: not lost.
    """
    found, before = [], set(request.ids.tolist())
    if request.top_k == 1:
        return found  # there is one category
    rows = zip(answer.target_ids.tolist(), answer.top_ids, answer.top_logprobs, strict=True)
    for target, ids, logprobs in rows:
        if target not in request.stop_ids:
            found.append(_drawn(target, ids, logprobs, before, request.stop_ids))
        before.add(target)
    return found


def judge(drawn: Sequence[Drawn]) -> Verdict:
    """Whether the tokens are from what was reported.

    Args:
      drawn: one at least; of several texts if they were drawn independently.
    """
    tables = [(_log_ratios(one), one) for one in drawn]
    logs_A = np.sum([log_AC[:, one.own] for log_AC, one in tables], axis=0)
    greedy_A = np.sum([log_AC[:, one.p_C[:-1].argmax()] for log_AC, one in tables], axis=0)
    evidence = _log_mean(logs_A)
    fine = evidence < np.log(_DOUBT) and _log_mean(greedy_A) >= np.log(ODDS)
    expected = [
        _log_mean(np.sum([log_AC @ one.at_power(power) for log_AC, one in tables], axis=0))
        for power in _TOLD_APART
    ]
    return Verdict(
        caught=evidence >= np.log(ODDS),
        fine=fine,
        enough=fine and min(expected) >= np.log(ODDS),
        surprise=float(np.mean([-np.log(one.each_C[one.own]) for one in drawn])),
        entropy=float(np.mean([-one.p_C @ np.log(one.each_C) for one in drawn])),
        kind=_KINDS[int(logs_A.argmax())],
    )


def _drawn(
    target: int, ids: np.ndarray, logprobs: np.ndarray, before: set[int], stop_ids: Sequence[int]
) -> Drawn:
    there = np.flatnonzero(logprobs > -np.inf)[: len(ids) - 1]
    kept = [j for j in there if ids[j] not in stop_ids]
    p = np.exp(logprobs[there].astype(np.float64))
    rest = max(1.0 - p.sum(), 0.0)
    p_C = np.maximum([*np.exp(logprobs[kept].astype(np.float64)), rest], _LEAST)
    names = ids[kept].tolist()
    own = names.index(target) if target in names else len(names)
    seen_C = np.asarray([i in before for i in names] + [False])
    return Drawn(p_C / p_C.sum(), own, seen_C)


def _log_ratios(drawn: Drawn) -> np.ndarray:
    """log q / p [A,C] for every q that is no honest server's; the mean ratio under p is 1."""
    p_C, seen_C = drawn.p_C, drawn.seen_C
    others = np.append(np.full(len(p_C) - 1, 0.5 / max(len(p_C) - 1, 1)), 0.5)
    others_C = others / others.sum()
    before_C = np.cumsum(p_C) - p_C
    rows = [
        *[drawn.each_C ** (power - 1.0) for power in _POWERS],
        *[np.where(seen_C, factor, 1.0) for factor in _AVOIDED],
        0.5 + 0.5 * others_C / p_C,  # half of the time from the others
        np.where(before_C < _NUCLEUS, 1.0, _CUT),
        np.append(np.ones(len(p_C) - 1), _CUT),
    ]
    weights_AC = np.asarray(rows)
    return np.log(weights_AC) - np.log(weights_AC @ p_C)[:, None]


def _log_mean(logs_A: np.ndarray) -> float:
    return float(np.logaddexp.reduce(logs_A) - np.log(len(logs_A)))
