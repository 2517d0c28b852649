"""Answers as bytes, without loss: 110 to 130 of them a token at K=20, where the arrays have 168.

This format of our own is in the stores of earlier runs; zlib alone makes 130 to 145 bytes of the
arrays as they are in memory.

A header of 18 bytes, little-endian: CRC-32 of `context` and all that follows, format, flags (1
finished, 2 lost), n, K, unmapped. Then a raw deflate stream of eight byte planes, the lowest
significance first: four of the ids [n,1+K], four of the logprobs [n,1+K+1] (target, best K, tail).
High bytes are alike, and so compress well. A row of logprobs falls slowly, so its bits are stored
as differences of neighbours, modulo 2**32.
"""

import struct
import zlib

import numpy as np

from gkdjax.teachers.server.answers import TeacherAnswer

_FORMAT = 1
_HEADER = struct.Struct("<IBBIII")  # crc, format, flags, n, K, unmapped
_CRC = struct.Struct("<I")
_FINISHED, _LOST = 1, 2
_RAW = -zlib.MAX_WBITS  # deflate without zlib's own header


def encode(answer: TeacherAnswer, context: bytes = b"") -> bytes:
    """The bytes from which `decode` makes the same answer, bit for bit.

    The checksum covers `context`, which is not in the bytes.

    Raises:
      ValueError: other dtypes than int32 and float32, or shapes that do not fit together.
    """
    n, K = answer.top_ids.shape
    ids = [answer.target_ids[:, None], answer.top_ids]
    logprobs = [answer.target_logprob[:, None], answer.top_logprobs, answer.tail_logprob[:, None]]
    kinds = {part.dtype for part in ids}, {part.dtype for part in logprobs}
    if kinds != ({np.dtype(np.int32)}, {np.dtype(np.float32)}):
        raise ValueError(f"ids are int32 and logprobs float32, not {kinds}")
    if answer.top_logprobs.shape != (n, K):
        raise ValueError(f"{answer.top_logprobs.shape} logprobs of {(n, K)} ids")
    bits = np.concatenate(logprobs, axis=1).view(np.int32)
    planes = b"".join(
        np.ascontiguousarray(matrix, "<i4").view(np.uint8).reshape(-1, 4).T.tobytes()
        for matrix in (np.concatenate(ids, axis=1), np.diff(bits, axis=1, prepend=np.int32(0)))
    )
    flags = _FINISHED * answer.finished | _LOST * answer.lost
    header = _HEADER.pack(0, _FORMAT, flags, n, K, answer.unmapped)[_CRC.size :]
    rest = header + zlib.compress(planes, wbits=_RAW)
    return _CRC.pack(zlib.crc32(rest, zlib.crc32(context))) + rest


def decode(data: bytes, context: bytes = b"") -> TeacherAnswer:
    """The answer that `encode` was given.

    Raises:
      ValueError: the bytes are damaged, of another context, or of another format.
    """
    if len(data) < _HEADER.size:
        raise ValueError(f"{len(data)} bytes are too few")
    crc, version, flags, n, K, unmapped = _HEADER.unpack_from(data)
    if crc != zlib.crc32(data[_CRC.size :], zlib.crc32(context)):
        raise ValueError("its checksum is another")
    if version != _FORMAT:
        raise ValueError(f"it is of format {version}, and this code reads format {_FORMAT}")
    size = 4 * n * (1 + K) + 4 * n * (K + 2)
    stream = zlib.decompressobj(wbits=_RAW)
    planes = np.frombuffer(stream.decompress(data[_HEADER.size :], size + 1), np.uint8)
    if len(planes) != size:
        raise ValueError(f"it holds another number of bytes than {size}")
    ids, steps = (
        part.reshape(4, -1).T.copy().view("<i4").reshape(n, width).astype(np.int32)
        for part, width in zip(np.split(planes, [4 * n * (1 + K)]), (1 + K, K + 2), strict=True)
    )
    logprobs = np.cumsum(steps, axis=1, dtype=np.int32).view(np.float32)
    return TeacherAnswer(
        target_ids=ids[:, 0].copy(),
        target_logprob=logprobs[:, 0].copy(),
        top_ids=ids[:, 1:].copy(),
        top_logprobs=logprobs[:, 1:-1].copy(),
        tail_logprob=logprobs[:, -1].copy(),
        finished=bool(flags & _FINISHED),
        unmapped=unmapped,
        lost=bool(flags & _LOST),
    )
