"""Answers as bytes: the same bits come back, few bytes, and damage is seen."""

import dataclasses

import numpy as np
import pytest

from gkdjax.teachers.server.answers import TeacherAnswer, lost_sample
from gkdjax.teachers.server.store import codec

ARRAYS = ("target_ids", "target_logprob", "top_ids", "top_logprobs", "tail_logprob")


def realistic(n: int, top_k: int, seed: int = 0) -> TeacherAnswer:
    """Sorted logprobs of rows that are more and less sure; ids of a Zipf law below 262,144."""
    rng = np.random.default_rng(seed)
    logits_nV = np.sort(rng.gumbel(size=(n, top_k + 400)) * rng.lognormal(0.9, 0.5, (n, 1)))
    logits_nV = logits_nV[:, ::-1]
    logprobs = logits_nV - np.log(np.exp(logits_nV).sum(axis=1, keepdims=True))
    top = logprobs[:, :top_k].astype(np.float32)
    tail = np.log(np.maximum(1 - np.exp(top.astype(np.float64)).sum(axis=1), 1e-7))
    ranks = (262_144 ** rng.random((n, top_k))).astype(int) - 1
    ids = rng.permutation(262_144)[ranks].astype(np.int32)
    drawn = np.minimum(rng.geometric(0.7, n) - 1, top_k - 1), np.arange(n)
    return TeacherAnswer(
        ids[drawn[::-1]], top[drawn[::-1]], ids, top, tail.astype(np.float32), True, 3
    )


def with_absent(answer: TeacherAnswer) -> TeacherAnswer:
    top = answer.top_logprobs.copy()
    top[1::2, 3:] = -np.inf
    top[0, 0], top[0, 1] = np.nan, -0.0
    return dataclasses.replace(answer, top_logprobs=top, target_logprob=top[:, -1].copy())


def assert_same(a: TeacherAnswer, b: TeacherAnswer) -> None:
    for name in ARRAYS:
        one, other = getattr(a, name), getattr(b, name)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        assert other.flags.writeable and other.flags.c_contiguous
    assert (a.finished, a.unmapped, a.lost) == (b.finished, b.unmapped, b.lost)


@pytest.mark.parametrize(
    "answer",
    [
        realistic(7, 20),
        realistic(1, 1),
        with_absent(realistic(6, 5)),
        lost_sample(20, 4),
        dataclasses.replace(realistic(2, 3), finished=False, unmapped=2**32 - 1),
    ],
)
def test_the_same_bits_come_back(answer):
    assert_same(answer, codec.decode(codec.encode(answer)))


def test_what_was_written_once_can_be_read():
    """Bytes like these are in people's stores."""
    data = bytes.fromhex(
        "048c1be1010101000000020000000100000062677f0010400c0c9301028881810520801818"
        "1800020804000208040002482181c10120800efc733c00106000"
    )
    top = np.array([[-0.25, -np.inf]], np.float32)
    tops = np.array([[7, 300_000]], np.int32), top
    one = np.array([7], np.int32), np.array([-2.5], np.float32)
    written = TeacherAnswer(*one, *tops, np.array([-1.5], np.float32), finished=True, unmapped=1)
    assert_same(written, codec.decode(data, b"about"))


def test_bytes_a_token():
    for n in (64, 200):
        assert len(codec.encode(realistic(n, 20))) / n <= 123  # of 168
    assert len(codec.encode(realistic(10, 20))) / 10 <= 134
    assert len(codec.encode(lost_sample(20, 0))) <= 32


def test_every_flipped_bit_is_seen():
    data = codec.encode(realistic(3, 4))
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            codec.decode(bytes(damaged))


def test_missing_and_surplus_bytes_are_seen():
    data = codec.encode(realistic(3, 4))
    for damaged in (b"", data[:10], data[:-1], data + b"\0", data[:40] + data[41:]):
        with pytest.raises(ValueError, match=r"too few|checksum"):
            codec.decode(damaged)


def test_what_it_is_about_is_under_the_checksum():
    answer = realistic(3, 4)
    assert_same(answer, codec.decode(codec.encode(answer, b"a"), b"a"))
    with pytest.raises(ValueError, match="checksum"):
        codec.decode(codec.encode(answer, b"a"), b"b")


def test_what_would_not_come_back_is_refused():
    answer = realistic(3, 4)
    for change in (
        {"top_ids": answer.top_ids.astype(np.int64)},
        {"top_logprobs": answer.top_logprobs.astype(np.float64)},
        {"tail_logprob": answer.tail_logprob.astype(np.float16)},
        {"top_logprobs": answer.top_logprobs[:, :3]},
        {"target_ids": answer.target_ids[:2]},
    ):
        with pytest.raises(ValueError):
            codec.encode(dataclasses.replace(answer, **change))
