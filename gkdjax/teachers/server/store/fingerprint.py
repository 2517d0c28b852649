"""What answers are filed under: the identity of a teacher, and the keys of requests."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest, TeacherAnswer

MAX_DRIFT = 0.05  # nats, between two answers of one teacher to the probe


@dataclasses.dataclass(frozen=True)
class TeacherIdentity:
    """The weights behind a server, known by their answer to a probe and not by an address."""

    fingerprint: str  # hex, see `fingerprint_of`
    model: str  # its name in requests
    tokenizer: str  # hash of it, hex
    probe: TeacherAnswer  # to the preflight's fixed request
    findings: dict[str, Any]  # of the preflight, as JSON: enough to run without the server
    checked: str  # ISO time of the last preflight


def fingerprint_of(model: str, tokenizer: str, probe: TeacherAnswer) -> str:
    """SHA-256 in hex. Try `same_teacher` with known probes first: the last bits are noise."""
    head = json.dumps([model, tokenizer, *probe.top_ids.shape, probe.finished, probe.unmapped])
    digest = hashlib.sha256(head.encode())
    for ids in (probe.target_ids, probe.top_ids):
        digest.update(np.ascontiguousarray(ids, "<i4").tobytes())
    for logprobs in (probe.target_logprob, probe.top_logprobs, probe.tail_logprob):
        digest.update(np.ascontiguousarray(logprobs, "<f4").tobytes())
    return digest.hexdigest()


def same_teacher(a: TeacherAnswer, b: TeacherAnswer) -> bool:
    """Whether two answers to one probe come from the same weights: `drift` within `MAX_DRIFT`.

    A server does not repeat its bits, as sums change with the batch that it computes. Independent
    noise of standard deviation s is a drift of 0.8 s. Arithmetic in bfloat16 can move an unlikely
    token by 0.25 nats, but those hardly count; other weights move all tokens.

    Args:
      a, b: scores of one text, or greedy answers to one prompt. Those part where two tokens are
        equally likely, and are compared up to and including the first different token.
    """
    rows = min(len(a.target_ids), len(b.target_ids))
    if rows == 0 or a.top_ids.shape[1] != b.top_ids.shape[1]:
        return False
    different = np.flatnonzero(a.target_ids[:rows] != b.target_ids[:rows])
    comparable = slice(int(different[0]) + 1 if len(different) else rows)
    return drift(a.rows(comparable), b.rows(comparable)) <= MAX_DRIFT


def drift(a: TeacherAnswer, b: TeacherAnswer) -> float:
    """The distance of two answers with the same number of tokens and K: nats, finite.

    It is the mean over tokens of sum_k p_k |log p_k - log p'_k|, p from `a` or from `b`, the larger
    of the two. A token that only one answer lists has in the other the largest probability that is
    possible there, so that ties which change places at rank K cost nothing.
    """
    return max(_drift(a, b), _drift(b, a))


def _drift(a: TeacherAnswer, b: TeacherAnswer) -> float:
    present, present_b = a.top_logprobs > -np.inf, b.top_logprobs > -np.inf
    same_nKK = (a.top_ids[:, :, None] == b.top_ids[:, None, :]) & present_b[:, None, :]
    listed = np.take_along_axis(b.top_logprobs, same_nKK.argmax(axis=2), axis=1)
    # A token that b does not list is in its tail, and no more probable than the last one listed.
    bound = np.minimum(b.tail_logprob, np.where(present_b, b.top_logprobs, 0.0).min(axis=1))
    other = np.where(same_nKK.any(axis=2), listed, bound[:, None])
    logprobs = np.where(present, a.top_logprobs, other).astype(np.float64)
    distance = np.where(present, np.exp(logprobs), 0.0) * np.abs(logprobs - other)
    return float(distance.sum(axis=1).mean())


def score_key(teacher: TeacherIdentity, request: ScoreRequest) -> str:
    """SHA-256 in hex of all that the answer depends on: neither the row's name nor an address."""
    fields = {"ids": request.ids.tolist(), "at": request.at.tolist(), "top_k": int(request.top_k)}
    return _key(teacher, "score", fields)


def sample_key(teacher: TeacherIdentity, request: SampleRequest, *, by_messages: bool) -> str:
    """Like `score_key`; `by_messages`: the server reads the messages, not the ids."""
    sampling = request.sampling
    fields = {
        "sampling": {
            "max_new_tokens": int(sampling.max_new_tokens),
            "temperature": float(sampling.temperature),  # 1 and 1.0 are the same
            "top_p": float(sampling.top_p),
            "top_k": sampling.top_k,
        },
        "seed": int(request.seed),
        "stop_ids": sorted(map(int, request.stop_ids)),
        "top_k": int(request.top_k),
    }
    if by_messages:
        # Empty fields are left out, so that keys are what they were before these fields existed.
        fields["messages"] = [
            [message.role, message.content, *([message.fields] if message.fields else [])]
            for message in request.messages
        ]
        optional = {"template_kwargs": request.template_kwargs, "tools": request.tools}
        fields |= {name: value for name, value in optional.items() if value}
    else:
        fields["ids"] = request.ids.tolist()
    return _key(teacher, "sample", fields)


def _key(teacher: TeacherIdentity, kind: str, fields: dict) -> str:
    names = {"model": teacher.model, "fingerprint": teacher.fingerprint}
    whole = fields | names | {"tokenizer": teacher.tokenizer, "kind": kind}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
