"""A test with exact odds that tokens were sampled from the distributions that came with them.

For a few ways in which servers go wrong, the probability of a token is divided by the one that the
server reports. If the report is true, the product of such ratios over successive tokens has the
mean 1, whatever the model, and so has the mean over all ways: it exceeds a million for less than
one server in a million, however many tokens are sampled (Ville's inequality).

Letters: C categories: the best K - 1 ids without the stop ids, and all others as one. The K-th may
be listed only because it was sampled, and not every server shows stop ids. A ways to go wrong.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gkdjax.teachers.server.answers import SampleRequest, TeacherAnswer

ODDS = 1e6
_DOUBT = 100.0  # odds above which more tokens are sampled; that may be repeated
_MIN_PROBABILITY = 1e-9  # of a category
_POWERS = (5.0, 2.0, 1.25, 0.8, 0.5)  # of the probabilities: 1 / temperature
_USUAL_POWERS = (1 / 0.7, 1 / 1.3)  # by temperatures in use, which `enough` tokens show
_PENALTIES = (0.5, 0.15)  # factors for tokens that stand in the text before
_NUCLEUS, _CUT = 0.9, 0.02  # a cut, and the factor for what is beyond it
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


class SampledToken(NamedTuple):
    """A token and the distribution that it should be from."""

    p_C: np.ndarray  # float64, sums to 1
    own: int  # the category of the token
    seen_C: np.ndarray  # bool: ids that stand in the text before

    @property
    def each_C(self) -> np.ndarray:
        """The probability of one token of a category; half the last one's for all others."""
        return np.append(self.p_C[:-1], self.p_C[:-1].min(initial=1.0) / 2)


class Verdict(NamedTuple):
    """What some tokens show."""

    caught: bool  # an honest server has such tokens once in a million times
    fine: bool  # nothing is odd, and so many tokens would show a greedy server
    enough: bool  # and on average temperatures of 0.7 and 1.3
    surprise: float  # mean negative logprob, nats; an estimate for tokens not among the best
    entropy: float  # its expectation, nats
    kind: str  # the way to go wrong that fits best, for people


def tokens_of(request: SampleRequest, answer: TeacherAnswer) -> list[SampledToken]:
    """The tokens but stop ids of an answer that is not lost, sampled at temperature 1 uncut."""
    if request.top_k == 1:
        return []  # there is one category
    found, before = [], set(request.ids.tolist())
    for target, ids, logprobs in zip(
        answer.target_ids.tolist(), answer.top_ids, answer.top_logprobs, strict=True
    ):
        if target not in request.stop_ids:
            listed = np.flatnonzero(logprobs > -np.inf)[: len(ids) - 1]
            p = np.exp(logprobs[listed].astype(np.float64))
            is_text = ~np.isin(ids[listed], request.stop_ids)
            names = ids[listed][is_text].tolist()
            p_C = np.maximum(np.append(p[is_text], 1.0 - p.sum()), _MIN_PROBABILITY)
            own = names.index(target) if target in names else len(names)
            seen_C = np.asarray([i in before for i in names] + [False])
            found.append(SampledToken(p_C / p_C.sum(), own, seen_C))
        before.add(target)
    return found


def judge(tokens: Sequence[SampledToken]) -> Verdict:
    """Judges tokens, one at least; those of several texts if they were sampled independently."""
    tables = [(_log_ratios(token), token) for token in tokens]
    logs_A = np.sum([log_AC[:, token.own] for log_AC, token in tables], axis=0)
    greedy_A = np.sum([log_AC[:, token.p_C[:-1].argmax()] for log_AC, token in tables], axis=0)
    evidence = _log_mean(logs_A)
    fine = evidence < np.log(_DOUBT) and _log_mean(greedy_A) >= np.log(ODDS)
    expected = []
    for power in _USUAL_POWERS:
        weights = [token.p_C * token.each_C ** (power - 1.0) for token in tokens]
        logs = [log_AC @ (w / w.sum()) for (log_AC, _), w in zip(tables, weights, strict=True)]
        expected.append(_log_mean(np.sum(logs, axis=0)))
    return Verdict(
        caught=evidence >= np.log(ODDS),
        fine=fine,
        enough=fine and min(expected) >= np.log(ODDS),
        surprise=float(np.mean([-np.log(token.each_C[token.own]) for token in tokens])),
        entropy=float(np.mean([-token.p_C @ np.log(token.each_C) for token in tokens])),
        kind=_KINDS[int(logs_A.argmax())],
    )


def _log_ratios(token: SampledToken) -> np.ndarray:
    """log q / p [A,C] of each way q to go wrong; the mean ratio under p is 1."""
    p_C, others = token.p_C, len(token.p_C) - 1
    uniform_C = np.append(np.full(others, 0.5 / max(others, 1)), 0.5)
    weights_AC = np.asarray(
        [
            *[token.each_C ** (power - 1.0) for power in _POWERS],
            *[np.where(token.seen_C, factor, 1.0) for factor in _PENALTIES],
            0.5 + 0.5 * uniform_C / uniform_C.sum() / p_C,  # half of the time uniformly
            np.where(np.cumsum(p_C) - p_C < _NUCLEUS, 1.0, _CUT),
            np.append(np.ones(others), _CUT),
        ]
    )
    return np.log(weights_AC) - np.log(weights_AC @ p_C)[:, None]


def _log_mean(logs_A: np.ndarray) -> float:
    return float(np.logaddexp.reduce(logs_A) - np.log(len(logs_A)))
