"""Answers as bytes: the same bits come back, few bytes, and damage is seen."""

import dataclasses

import numpy as np
import pytest

from gkdjax.teachers.server.answers import TeacherAnswer, lost_sample
from gkdjax.teachers.server.store import codec


def realistic(n: int, top_k: int, **change) -> TeacherAnswer:
    """Sorted logprobs of rows that are more and less sure; ids of a Zipf law below 262,144."""
    rng = np.random.default_rng(0)
    logits_nV = np.sort(rng.gumbel(size=(n, top_k + 400)) * rng.lognormal(0.9, 0.5, (n, 1)))
    logits_nV = logits_nV[:, ::-1]
    logprobs = logits_nV - np.log(np.exp(logits_nV).sum(axis=1, keepdims=True))
    top = logprobs[:, :top_k].astype(np.float32)
    tail = np.log(np.maximum(1 - np.exp(top.astype(np.float64)).sum(axis=1), 1e-7))
    ranks = (262_144 ** rng.random((n, top_k))).astype(int) - 1
    ids = rng.permutation(262_144)[ranks].astype(np.int32)
    drawn = np.arange(n), np.minimum(rng.geometric(0.7, n) - 1, top_k - 1)
    made = TeacherAnswer(ids[drawn], top[drawn], ids, top, tail.astype(np.float32), True, 3)
    return dataclasses.replace(made, **change)


def with_absent() -> TeacherAnswer:
    answer = realistic(6, 5)
    answer.top_logprobs[1::2, 3:] = -np.inf
    answer.top_logprobs[0, :2] = np.nan, -0.0
    return answer


def assert_same(a: TeacherAnswer, b: TeacherAnswer) -> None:
    for field in dataclasses.fields(TeacherAnswer):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if not isinstance(one, np.ndarray):
            assert one == other
            continue
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        assert other.flags.writeable and other.flags.c_contiguous


@pytest.mark.parametrize(
    "answer",
    [
        realistic(7, 20),
        realistic(1, 1),
        with_absent(),
        lost_sample(20, 4),
        realistic(2, 3, finished=False, unmapped=2**32 - 1),
    ],
)
def test_the_same_bits_come_back_in_their_context(answer):
    data = codec.encode(answer, b"a")
    assert_same(answer, codec.decode(data, b"a"))
    with pytest.raises(ValueError, match="checksum"):
        codec.decode(data, b"b")


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


@pytest.mark.parametrize("n, most", [(10, 134), (64, 123), (200, 123)])
def test_bytes_a_token(n, most):
    assert len(codec.encode(realistic(n, 20))) / n <= most  # of 168


def test_every_damage_is_seen():
    data = codec.encode(realistic(3, 4))
    damaged = [b"", data[:10], data[:-1], data + b"\0", data[:40] + data[41:]]
    for bit in range(8 * len(data)):
        at = bit // 8
        damaged.append(data[:at] + bytes([data[at] ^ 1 << bit % 8]) + data[at + 1 :])
    for one in damaged:
        with pytest.raises(ValueError, match=r"too few|checksum"):
            codec.decode(one)
    later = b"\2" + data[5:]
    with pytest.raises(ValueError, match="format 2"):
        codec.decode(codec._CRC.pack(codec.zlib.crc32(later)) + later)


@pytest.mark.parametrize(
    "field, change",
    [
        ("top_ids", lambda x: x.astype(np.int64)),
        ("top_logprobs", lambda x: x.astype(np.float64)),
        ("tail_logprob", lambda x: x.astype(np.float16)),
        ("top_logprobs", lambda x: x[:, :3]),
        ("target_ids", lambda x: x[:2]),
    ],
)
def test_what_would_not_come_back_is_refused(field, change):
    answer = realistic(3, 4)
    with pytest.raises(ValueError):
        codec.encode(dataclasses.replace(answer, **{field: change(getattr(answer, field))}))
