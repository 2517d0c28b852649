"""Who answered and what was asked: teachers recognised in spite of noise, keys that stay."""

import dataclasses

import numpy as np
import pytest
from stored_answers import answer, noisy

from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest, TeacherAnswer
from gkdjax.teachers.server.store import codec
from gkdjax.teachers.server.store.fingerprint import (
    TeacherIdentity,
    fingerprint_of,
    same_teacher,
    sample_key,
    score_key,
)
from gkdjax.types import Message, SamplingParams

PROBE, LONG = answer(100), answer(100, n=64, top_k=20)
FEWER = {"top_ids": PROBE.top_ids[:, :-1], "top_logprobs": PROBE.top_logprobs[:, :-1]}


def listing(*best: tuple[int, float]) -> TeacherAnswer:
    """One target; (id, probability) of the best, and the rest in the tail."""
    ids, probabilities = np.array([i for i, _ in best], np.int32), np.array([p for _, p in best])
    tail = np.log1p(-probabilities.sum(keepdims=True))
    top = np.where(probabilities > 0, np.log(np.maximum(probabilities, 1e-9)), -np.inf)
    target, tops, tail = (x.astype(np.float32) for x in (top[:1], top[None], tail))
    return TeacherAnswer(np.zeros(1, np.int32), target, ids[None], tops, tail)


def parted(rows: int) -> TeacherAnswer:
    """A greedy answer that parts at its third token, by the same weights in the first `rows`."""
    other, ids = answer(101), PROBE.target_ids.copy()
    ids[2] += 1
    mixed = {
        name: np.concatenate([getattr(PROBE, name)[:rows], getattr(other, name)[rows:]])
        for name in ("top_ids", "top_logprobs", "tail_logprob")
    }
    return dataclasses.replace(PROBE, target_ids=ids, **mixed)


SURE, WHOLE = listing((1, 0.8), (2, 0.1), (3, 0.05)), listing((1, 0.7), (2, 0.29))


@pytest.mark.parametrize(
    "a, b, same",
    [
        (LONG, LONG, True),
        (LONG, noisy(LONG, 0.05), True),
        (LONG, noisy(LONG, 0.2), False),
        (LONG, answer(101, n=64, top_k=20), False),
        # A tie at the last rank is no difference, another best token is.
        (listing((1, 0.1), (2, 0.1), (3, 0.1)), listing((1, 0.1), (2, 0.1), (4, 0.1)), True),
        (SURE, listing((4, 0.8), (2, 0.1), (3, 0.05)), False),
        # Tokens that one answer leaves out are in its tail.
        (WHOLE, listing((1, 0.7), (2, 0.0)), True),
        (listing((1, 0.5), (2, 0.29)), listing((1, 0.7), (2, 0.0)), False),
        (WHOLE, listing((1, 0.0), (2, 0.0)), False),
        # Other texts prove nothing.
        (PROBE, answer(101, n=3), False),
        (answer(1, n=0), answer(1, n=0), False),
        (PROBE, dataclasses.replace(PROBE, **FEWER), False),
        # Greedy answers are compared up to where they part, and the place after the same tokens.
        (PROBE, parted(3), True),
        (PROBE, parted(2), False),
    ],
)
def test_the_same_teacher_in_spite_of_noise(a, b, same):
    assert same_teacher(a, b) == same_teacher(b, a) == same


def test_fingerprints_differ():
    probe = answer(1)
    flipped = probe.top_ids.copy()
    flipped[-1, -1] += 1
    changes = (
        {"top_ids": flipped},
        {"tail_logprob": probe.tail_logprob - 1},
        {"target_ids": probe.target_ids + 1},
    )
    probes = [probe, noisy(probe, 1e-6), *(dataclasses.replace(probe, **c) for c in changes)]
    made = [fingerprint_of("m", "t", one) for one in probes]
    made += [fingerprint_of("n", "t", probe), fingerprint_of("m", "u", probe)]
    assert len(set(made)) == len(made) and all(len(fingerprint) == 64 for fingerprint in made)
    assert fingerprint_of("m", "t", codec.decode(codec.encode(probe))) == made[0]


PLAIN = TeacherIdentity("0123456789abcdef", "big", "ab" * 32, answer(1), {}, "2026-11-23")
SCORE = ScoreRequest("a:1", np.arange(5, 12, dtype=np.int32), np.array([2, 4], np.int32), 20)
SAMPLE = SampleRequest(
    *("a:1", np.arange(5, 9, dtype=np.int32), (Message("user", "é \ud800"),)),
    *(SamplingParams(16, 1.0, 0.9), 7, (1, 106), 20),
)
KINDS = {
    "score": (score_key, SCORE),
    "ids": (lambda *asked: sample_key(*asked, by_messages=False), SAMPLE),
    "messages": (lambda *asked: sample_key(*asked, by_messages=True), SAMPLE),
}


@pytest.mark.parametrize(
    "kind, key",
    [
        ("score", "0c9abb3a07df9d47313316acd25dcc0f0e578525a9385fa9d819490aae571502"),
        ("ids", "97dbd873f5f16cf9da2a59cab8fc5c5c1d627c8e84a50098301c1bf87d57ac7c"),
        ("messages", "549e26a1afa4a4f41ccc9a316af3b72f639aab2ba140ab1d68273b91fe00ee67"),
    ],
)
def test_keys_are_what_they_were(kind, key):
    """These digests find answers that people have paid for."""
    key_of, request = KINDS[kind]
    assert key_of(PLAIN, request) == key


SAMPLING_CHANGES = [
    {"sampling": SamplingParams(*how)}
    for how in ((17, 1.0, 0.9), (16, 0.5, 0.9), (16, 1.0, 1.0), (16, 1.0, 0.9, 64))
]
SAMPLE_CHANGES = [{"seed": 8}, {"stop_ids": (1,)}, {"top_k": 19}, *SAMPLING_CHANGES]
IDS_CHANGE = {"ids": SAMPLE.ids + 1}
MESSAGE_CHANGES = [
    {"messages": (Message(*message),)} for message in (("user", "è"), ("system", "é \ud800"))
]
SAME_SAMPLE = {
    "seed": np.int64(7),
    "stop_ids": (np.int32(106), 1),
    "sampling": SamplingParams(np.int32(16), 1, np.float64(0.9)),
}


@pytest.mark.parametrize(
    "kind, changes, same",
    [
        (
            "score",
            [
                *({"ids": SCORE.ids + 1}, {"ids": SCORE.ids[:-1]}, {"at": SCORE.at[:1]}),
                *({"at": np.array([2, 3], np.int32)}, {"top_k": 19}),
            ],
            {"ids": SCORE.ids.astype(np.int64)},
        ),
        ("ids", [*SAMPLE_CHANGES, IDS_CHANGE], SAME_SAMPLE | MESSAGE_CHANGES[0]),
        ("messages", [*SAMPLE_CHANGES, *MESSAGE_CHANGES], SAME_SAMPLE | IDS_CHANGE),
    ],
)
def test_keys_differ_by_all_that_an_answer_depends_on(kind, changes, same):
    key_of, request = KINDS[kind]
    others = [{"fingerprint": "f" * 16}, {"model": "small"}, {"tokenizer": "cd" * 32}]
    made = [key_of(dataclasses.replace(PLAIN, **change), request) for change in others]
    made += [key_of(PLAIN, dataclasses.replace(request, **change)) for change in changes]
    made += [key_of(PLAIN, request) for key_of, request in KINDS.values()]
    assert len(set(made)) == len(made)
    renamed = dataclasses.replace(PLAIN, checked="2027", findings={"x": 1}, probe=answer(2))
    same_request = dataclasses.replace(request, name="b:2", **same)
    assert key_of(renamed, same_request) == key_of(PLAIN, request)
