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


def test_the_same_teacher_in_spite_of_noise():
    probe = answer(100, n=64, top_k=20)
    for other in (probe, noisy(probe, 0.02), noisy(probe, 0.05)):
        assert same_teacher(probe, other) and same_teacher(other, probe)
    for other in (answer(101, n=64, top_k=20), noisy(probe, 0.2)):
        assert not same_teacher(probe, other) and not same_teacher(other, probe)


def listing(*best: tuple[int, float]) -> TeacherAnswer:
    """One target; (id, probability) of the best, and the rest in the tail."""
    ids, probabilities = np.array([i for i, _ in best], np.int32), np.array([p for _, p in best])
    tail = np.log1p(-probabilities.sum(keepdims=True))
    top = np.where(probabilities > 0, np.log(np.maximum(probabilities, 1e-9)), -np.inf)
    target, tops, tail = (x.astype(np.float32) for x in (top[:1], top[None], tail))
    return TeacherAnswer(np.zeros(1, np.int32), target, ids[None], tops, tail)


def test_a_tie_at_the_last_rank_is_no_difference():
    flat = listing((1, 0.1), (2, 0.1), (3, 0.1))
    swapped = listing((1, 0.1), (2, 0.1), (4, 0.1))
    assert same_teacher(flat, swapped) and same_teacher(swapped, flat)
    sure = listing((1, 0.8), (2, 0.1), (3, 0.05))
    assert not same_teacher(sure, listing((4, 0.8), (2, 0.1), (3, 0.05)))


def test_what_one_answer_leaves_out_is_in_its_tail():
    whole, cut = listing((1, 0.7), (2, 0.29)), listing((1, 0.7), (2, 0.0))
    assert same_teacher(whole, cut) and same_teacher(cut, whole)
    other = listing((1, 0.5), (2, 0.29))
    assert not same_teacher(other, cut) and not same_teacher(cut, other)
    nothing = listing((1, 0.0), (2, 0.0))
    assert not same_teacher(whole, nothing) and not same_teacher(nothing, whole)


def test_probes_of_other_texts_prove_nothing():
    probe = answer(100)
    assert not same_teacher(probe, answer(101, n=3))
    assert not same_teacher(answer(1, n=0), answer(1, n=0))
    fewer = dataclasses.replace(
        probe, top_ids=probe.top_ids[:, :-1], top_logprobs=probe.top_logprobs[:, :-1]
    )
    assert not same_teacher(probe, fewer)


def test_greedy_answers_are_compared_up_to_where_they_part():
    probe, other = answer(100), answer(101)
    parted = probe.target_ids.copy()
    parted[2] += 1

    def after(rows: int):
        """Of the same weights in so many rows, and of others in the rest."""
        mixed = {
            name: np.concatenate([getattr(probe, name)[:rows], getattr(other, name)[rows:]])
            for name in ("top_ids", "top_logprobs", "tail_logprob")
        }
        return dataclasses.replace(probe, target_ids=parted, **mixed)

    assert same_teacher(probe, after(3)) and same_teacher(after(3), probe)
    assert not same_teacher(probe, after(2))  # what is to follow the same two tokens differs


def test_fingerprints_differ():
    probe = answer(1)
    flipped = probe.top_ids.copy()
    flipped[-1, -1] += 1
    made = [
        fingerprint_of("m", "t", probe),
        fingerprint_of("n", "t", probe),
        fingerprint_of("m", "u", probe),
        fingerprint_of("m", "t", noisy(probe, 1e-6)),
        fingerprint_of("m", "t", dataclasses.replace(probe, top_ids=flipped)),
        fingerprint_of("m", "t", dataclasses.replace(probe, tail_logprob=probe.tail_logprob - 1)),
        fingerprint_of("m", "t", dataclasses.replace(probe, target_ids=probe.target_ids + 1)),
    ]
    assert len(set(made)) == len(made)
    assert fingerprint_of("m", "t", codec.decode(codec.encode(probe))) == made[0]
    assert all(len(fingerprint) == 64 for fingerprint in made)


PLAIN = TeacherIdentity("0123456789abcdef", "big", "ab" * 32, answer(1), {}, "2026-11-23")
SCORE = ScoreRequest("a:1", np.arange(5, 12, dtype=np.int32), np.array([2, 4], np.int32), 20)
SAMPLE = SampleRequest(
    *("a:1", np.arange(5, 9, dtype=np.int32), (Message("user", "é \ud800"),)),
    *(SamplingParams(16, 1.0, 0.9), 7, (1, 106), 20),
)
RENAMED = {"checked": "2027", "findings": {"x": 1}, "probe": answer(2)}
OTHERS = [{"fingerprint": "f" * 16}, {"model": "small"}, {"tokenizer": "cd" * 32}]


def test_keys_are_what_they_were():
    """These digests find answers that people have paid for."""
    assert (
        score_key(PLAIN, SCORE)
        == "0c9abb3a07df9d47313316acd25dcc0f0e578525a9385fa9d819490aae571502"
    )
    assert (
        sample_key(PLAIN, SAMPLE, by_messages=False)
        == "97dbd873f5f16cf9da2a59cab8fc5c5c1d627c8e84a50098301c1bf87d57ac7c"
    )
    assert (
        sample_key(PLAIN, SAMPLE, by_messages=True)
        == "549e26a1afa4a4f41ccc9a316af3b72f639aab2ba140ab1d68273b91fe00ee67"
    )


def test_score_keys():
    changed = [score_key(dataclasses.replace(PLAIN, **change), SCORE) for change in OTHERS]
    for change in (
        {"ids": np.arange(6, 13, dtype=np.int32)},
        {"ids": SCORE.ids[:-1]},
        {"at": np.array([2, 3], np.int32)},
        {"at": np.array([2], np.int32)},
        {"top_k": 19},
    ):
        changed.append(score_key(PLAIN, dataclasses.replace(SCORE, **change)))
    assert len({score_key(PLAIN, SCORE), *changed}) == 1 + len(changed)
    same_thing = dataclasses.replace(SCORE, name="b:2", ids=SCORE.ids.astype(np.int64), top_k=20)
    assert score_key(dataclasses.replace(PLAIN, **RENAMED), same_thing) == score_key(PLAIN, SCORE)


@pytest.mark.parametrize("by_messages", [False, True])
def test_sample_keys(by_messages):
    def made(request=SAMPLE, by=PLAIN):
        return sample_key(by, request, by_messages=by_messages)

    changed = [made(by=dataclasses.replace(PLAIN, **change)) for change in OTHERS]
    for change in (
        *({"seed": 8}, {"stop_ids": (1,)}, {"top_k": 19}),
        *(
            {"sampling": SamplingParams(*how)}
            for how in ((17, 1.0, 0.9), (16, 0.5, 0.9), (16, 1.0, 1.0))
        ),
        {"sampling": SamplingParams(16, 1.0, 0.9, 64)},
    ):
        changed.append(made(dataclasses.replace(SAMPLE, **change)))
    for role, content in (("user", "è"), ("system", "é \ud800")):
        other = dataclasses.replace(SAMPLE, messages=(Message(role, content),))
        assert (made(other) != made()) == by_messages
    other = dataclasses.replace(SAMPLE, ids=SAMPLE.ids + 1)
    assert (made(other) != made()) == (not by_messages)
    changed.append(sample_key(PLAIN, SAMPLE, by_messages=not by_messages))
    assert len({made(), *changed}) == 1 + len(changed)
    same_thing = {"name": "b:2", "seed": np.int64(7), "stop_ids": (np.int32(106), 1)}
    same_thing["sampling"] = SamplingParams(np.int32(16), 1, np.float64(0.9))
    assert made(dataclasses.replace(SAMPLE, **same_thing)) == made()
    assert made(by=dataclasses.replace(PLAIN, **RENAMED)) == made()
