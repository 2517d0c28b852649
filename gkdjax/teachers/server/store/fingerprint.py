"""Who answered: weights, known by what they say, and not by the address that they stand behind."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from gkdjax.teachers.server.answers import TeacherAnswer

MOST_DRIFT = 0.05  # nats, between two answers of one teacher to the probe


@dataclasses.dataclass(frozen=True)
class TeacherIdentity:
    """Weights behind a server, known by how they answer a probe."""

    fingerprint: str  # hex, see `fingerprint_of`
    model: str  # the name that requests carry
    tokenizer: str  # hash of it, hex
    probe: TeacherAnswer  # to the preflight's known request
    findings: dict[str, Any]  # of the preflight, as JSON has it: enough to run without the server
    checked: str  # ISO time of the last preflight


def fingerprint_of(model: str, tokenizer: str, probe: TeacherAnswer) -> str:
    """SHA-256 in hex; of a fresh probe, ask `same_teacher` first: its last bits are noise."""
    head = json.dumps([model, tokenizer, *probe.top_ids.shape, probe.finished, probe.unmapped])
    digest = hashlib.sha256(head.encode())
    for ids in (probe.target_ids, probe.top_ids):
        digest.update(np.ascontiguousarray(ids, "<i4").tobytes())
    for logprobs in (probe.target_logprob, probe.top_logprobs, probe.tail_logprob):
        digest.update(np.ascontiguousarray(logprobs, "<f4").tobytes())
    return digest.hexdigest()


def same_teacher(a: TeacherAnswer, b: TeacherAnswer) -> bool:
    """Whether two answers to one probe come from the same weights.

    A server does not give the same bits twice: sums change with the batch it happens to compute.
    So `drift` is held against `MOST_DRIFT`. Independent noise of standard deviation s makes that
    0.8 s. Arithmetic in bfloat16 can move an unlikely token by 0.25 nats, but those weigh next to
    nothing; other weights move all tokens by what there is to distil.

    Args:
      a, b: scores of one text, or greedy answers to one prompt. These part where two tokens are
        as likely, so they are compared as far as they are one, and where the next token stands.
    """
    rows = min(len(a.target_ids), len(b.target_ids))
    if rows == 0 or a.top_ids.shape[1] != b.top_ids.shape[1]:
        return False
    differ = np.flatnonzero(a.target_ids[:rows] != b.target_ids[:rows])
    alike = slice(int(differ[0]) + 1 if len(differ) else rows)
    return drift(a.rows(alike), b.rows(alike)) <= MOST_DRIFT


def drift(a: TeacherAnswer, b: TeacherAnswer) -> float:
    """How far two answers are apart, of as many tokens and one K: nats, finite.

    The mean over tokens of sum_k p_k |log p_k - log p'_k|, each weighing the other, and the larger
    of the two. A token that only one answer lists counts in the other with the most that it can
    have there, so a tie that changes places at rank K costs nothing.
    """
    return max(_drift(a, b), _drift(b, a))


def _drift(a: TeacherAnswer, b: TeacherAnswer) -> float:
    """Mean over rows of sum_k p_k |log p_k - log p'_k|, p of `a`: nats, finite."""
    there, there_b = a.top_logprobs > -np.inf, b.top_logprobs > -np.inf
    same_nKK = (a.top_ids[:, :, None] == b.top_ids[:, None, :]) & there_b[:, None, :]
    listed = np.take_along_axis(b.top_logprobs, same_nKK.argmax(axis=2), axis=1)
    # What b leaves out is in its tail, and no more probable than the last that it lists.
    most = np.minimum(b.tail_logprob, np.where(there_b, b.top_logprobs, 0.0).min(axis=1))
    other = np.where(same_nKK.any(axis=2), listed, most[:, None])
    logprobs = np.where(there, a.top_logprobs, other).astype(np.float64)
    drift = np.where(there, np.exp(logprobs), 0.0) * np.abs(logprobs - other)
    return float(drift.sum(axis=1).mean())
