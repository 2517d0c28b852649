"""The divergences in float64 NumPy, one line an equation, for the tests to compare with."""

import numpy as np

BETA = 0.3  # not 1/2: a swapped beta must show


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def log_sum_exp(x):
    m = x.max(-1, keepdims=True)
    return m + np.log(np.exp(x - m).sum(-1, keepdims=True))


def kl(log_a, log_b):
    with np.errstate(invalid="ignore"):
        terms = np.exp(log_a) * (log_a - log_b)
    return np.where(np.isneginf(log_a), 0.0, terms).sum(-1)


def generalized(log_p, log_q, beta):
    log_m = np.logaddexp(np.log(beta) + log_p, np.log(1 - beta) + log_q)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


DIVERGENCES = {
    "forward": kl,
    "reverse": lambda log_p, log_q: kl(log_q, log_p),
    "mixed": lambda log_p, log_q: (1 - BETA) * kl(log_p, log_q) + BETA * kl(log_q, log_p),
    "generalized": lambda log_p, log_q: generalized(log_p, log_q, BETA),
}


def bucket(log_x, ids):
    """log-probabilities [..., V] -> of the K ids and of all the rest: [..., K+1] (K for K = V)."""
    inside = np.take_along_axis(log_x, ids, -1)
    if ids.shape[-1] == log_x.shape[-1]:
        return inside
    outside = log_x.copy()
    np.put_along_axis(outside, ids, -np.inf, -1)
    return np.concatenate([inside, log_sum_exp(outside)], -1)


def renormalize(log_x, ids):
    return log_softmax(np.take_along_axis(log_x, ids, -1))


def divergence(name, student_logits, teacher_logits, ids=None, tail="bucket", temperature=1.0):
    """`name` between the two, dense where there are no ids."""
    log_p = log_softmax(np.asarray(teacher_logits, np.float64) / temperature)
    log_q = log_softmax(np.asarray(student_logits, np.float64) / temperature)
    if ids is not None:
        restrict = {"bucket": bucket, "renormalize": renormalize}[tail]
        log_p, log_q = restrict(log_p, ids), restrict(log_q, ids)
    return DIVERGENCES[name](log_p, log_q)


def gradient(value, x, step=1e-5):
    """Central differences of value(x [..., V]) -> [...], in float64, row by row: [..., V]."""
    x = np.asarray(x, np.float64)
    columns = []
    for i in range(x.shape[-1]):
        nudge = step * (np.arange(x.shape[-1]) == i)
        columns.append((value(x + nudge) - value(x - nudge)) / (2 * step))
    return np.stack(columns, -1)
