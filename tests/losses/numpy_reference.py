"""The divergences in float64 NumPy, one line an equation."""

import numpy as np

BETA = 0.3  # not 1/2: a swapped beta must show


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - log_sum_exp(x)


def log_sum_exp(x):
    m = x.max(-1, keepdims=True)
    return m + np.log(np.exp(x - m).sum(-1, keepdims=True))


def kl(log_a, log_b):
    with np.errstate(invalid="ignore"):
        terms = np.exp(log_a) * (log_a - log_b)
    return np.where(np.isneginf(log_a), 0.0, terms).sum(-1)


def generalized(log_p, log_q):
    log_m = np.logaddexp(np.log(BETA) + log_p, np.log(1 - BETA) + log_q)
    return BETA * kl(log_p, log_m) + (1 - BETA) * kl(log_q, log_m)


DIVERGENCES = {
    "forward_kl": kl,
    "reverse_kl": lambda log_p, log_q: kl(log_q, log_p),
    "mixed": lambda log_p, log_q: (1 - BETA) * kl(log_p, log_q) + BETA * kl(log_q, log_p),
    "generalized_jsd": generalized,
}


def bucket(log_x, ids):
    """log-probabilities [..., V] -> of the K ids and of all the rest: [..., K+1] (K for K = V)."""
    inside = np.take_along_axis(log_x, ids, -1)
    if ids.shape[-1] == log_x.shape[-1]:
        return inside
    outside = log_x.copy()
    np.put_along_axis(outside, ids, -np.inf, -1)
    return np.concatenate([inside, log_sum_exp(outside)], -1)


def restrict(log_x, ids, tail):
    if ids is None:
        return log_x
    if tail == "bucket":
        return bucket(log_x, ids)
    return log_softmax(np.take_along_axis(log_x, ids, -1))


def divergence(name, student_logits, teacher_logits, ids=None, tail="bucket", temperature=1.0):
    """Dense without ids, else of the top k."""
    both = (np.asarray(x, np.float64) / temperature for x in (teacher_logits, student_logits))
    ids = None if ids is None else np.asarray(ids)
    return DIVERGENCES[name](*(restrict(log_softmax(x), ids, tail) for x in both))


def gradient(value, x, step=1e-5):
    """Central differences of value(x [..., V]) -> [...], in float64, row by row: [..., V]."""
    x = np.asarray(x, np.float64)
    columns = []
    for i in range(x.shape[-1]):
        nudge = step * (np.arange(x.shape[-1]) == i)
        columns.append((value(x + nudge) - value(x - nudge)) / (2 * step))
    return np.stack(columns, -1)
