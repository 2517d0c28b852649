"""A store of made-up answers, for the tests of the store and of what reads it."""

import dataclasses
import hashlib

import numpy as np

from gkdjax.teachers.server.answers import TeacherAnswer
from gkdjax.teachers.server.store import codec
from gkdjax.teachers.server.store.answers import AnswerStore
from gkdjax.teachers.server.store.fingerprint import TeacherIdentity, fingerprint_of


def answer(seed: int, n: int = 4, top_k: int = 5) -> TeacherAnswer:
    rng = np.random.default_rng(seed)
    logits_nV = rng.gumbel(size=(n, 50)) * 2
    logprobs_nV = logits_nV - np.log(np.exp(logits_nV).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs_nV, axis=1)[:, :top_k].astype(np.int32)
    top = np.take_along_axis(logprobs_nV, ids, axis=1).astype(np.float32)
    tail = np.log1p(-np.exp(top).sum(axis=1))
    # The targets are the probe's text: the same whoever is asked.
    return TeacherAnswer(np.arange(n, dtype=np.int32), top[:, 0].copy(), ids, top, tail)


def noisy(of: TeacherAnswer, std: float) -> TeacherAnswer:
    noise = np.random.default_rng(0).normal(0, std, of.top_logprobs.shape)
    return dataclasses.replace(of, top_logprobs=(of.top_logprobs + noise).astype(np.float32))


def key(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest()


def items(*numbers: int) -> list[tuple[str, str, TeacherAnswer]]:
    return [(key(number), "score", answer(number)) for number in numbers]


def teacher(seed: int = 100, model: str = "big", tokenizer: str = "ab" * 32) -> TeacherIdentity:
    probe = answer(seed)
    fingerprint = fingerprint_of(model, tokenizer, probe)
    findings, checked = {"top_k": 5, "bos": None}, "2026-11-23T02:00:00+00:00"
    return TeacherIdentity(fingerprint, model, tokenizer, probe, findings, checked)


BIG = teacher()


def filled(path, *numbers: int) -> AnswerStore:
    made = AnswerStore(path)
    made.add_teacher(BIG)
    made.put(BIG.fingerprint, items(*numbers))
    return made


def same(a: TeacherAnswer, b: TeacherAnswer) -> bool:
    return codec.encode(a) == codec.encode(b)


def assert_holds(opened: AnswerStore, *numbers: int, of: range = range(0)) -> None:
    """It has these answers, and of all in `of` no others."""
    found = opened.get([key(number) for number in {*numbers, *of}])
    assert sorted(found) == sorted(map(key, numbers))
    assert all(same(found[key(number)], answer(number)) for number in numbers)
