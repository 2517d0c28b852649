"""An answer as bytes: lossless, 105 to 125 of them a token at K=20, of which 168 come in.

A header of 18 bytes, little-endian: CRC-32 of what the answer is about and of all that follows,
format, flags (1 finished, 2 lost), n, K, unmapped. Then one raw deflate stream of eight planes,
each the bytes of one significance, the lowest first: four of the ids [n,1+K], four of the logprobs
[n,1+K+1] (target, best K, tail). Where numbers are alike in their high bytes, that makes runs. A
row of logprobs falls slowly, so its bits are kept as differences of neighbours, modulo 2**32.
"""

import struct
import zlib

import numpy as np

from gkdjax.teachers.server.answers import TeacherAnswer

_FORMAT = 1
_HEADER = struct.Struct("<IBBIII")  # crc, format, flags, n, K, unmapped
_CRC = struct.Struct("<I")
_FINISHED, _LOST = 1, 2


def encode(answer: TeacherAnswer, about: bytes = b"") -> bytes:
    """The bytes that `decode` makes the same answer of, bit for bit.

    Args:
      answer: int32 and float32.
      about: not kept, but covered by the checksum: what else must be right of the answer.

    Raises:
      ValueError: arrays that are not int32 and float32, or whose shapes disagree.
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
    flags = _FINISHED * answer.finished | _LOST * answer.lost
    header = _HEADER.pack(0, _FORMAT, flags, n, K, answer.unmapped)[_CRC.size :]
    steps = np.diff(bits, axis=1, prepend=np.int32(0))
    rest = header + _deflate(np.concatenate(ids, axis=1), steps)
    return _CRC.pack(zlib.crc32(rest, zlib.crc32(about))) + rest


def decode(data: bytes, about: bytes = b"") -> TeacherAnswer:
    """What `encode` was given.

    Raises:
      ValueError: the bytes are damaged, about something else, or of another format; it says how.
    """
    if len(data) < _HEADER.size:
        raise ValueError(f"{len(data)} bytes are too few")
    crc, version, flags, n, K, unmapped = _HEADER.unpack_from(data)
    # Deflate alone would not see a bit that changed in its padding.
    if crc != zlib.crc32(data[_CRC.size :], zlib.crc32(about)):
        raise ValueError("its checksum is another")
    if version != _FORMAT:
        raise ValueError(f"it is of format {version}, and this code reads format {_FORMAT}")
    planes = _inflate(data[_HEADER.size :], 4 * n * (2 * K + 3))
    split = 4 * n * (1 + K)
    ids = _numbers(planes[:split], n, 1 + K)
    bits = _numbers(planes[split:], n, K + 2)
    logprobs = np.cumsum(bits, axis=1, dtype=np.int32).view(np.float32)
    return TeacherAnswer(
        *(ids[:, 0].copy(), logprobs[:, 0].copy()),
        *(ids[:, 1:].copy(), logprobs[:, 1:-1].copy(), logprobs[:, -1].copy()),
        finished=bool(flags & _FINISHED),
        unmapped=unmapped,
        lost=bool(flags & _LOST),
    )


def _deflate(*numbers: np.ndarray) -> bytes:
    """The planes of int32 matrices, one after the other."""
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    parts = []
    for matrix in numbers:
        for plane in np.ascontiguousarray(matrix, "<i4").view(np.uint8).reshape(-1, 4).T:
            parts.append(stream.compress(plane.tobytes()))
            # Ends the block: each plane gets a code of its own, which is 5 % of all bytes.
            parts.append(stream.flush(zlib.Z_PARTIAL_FLUSH))
    return b"".join([*parts, stream.flush()])


def _inflate(data: bytes, size: int) -> bytes:
    stream = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        # Not more than was announced, whatever the stream holds; 0 would mean no limit.
        planes = stream.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"it does not decompress: {error}") from None
    if len(planes) != size or not stream.eof or stream.unused_data:
        raise ValueError(f"it does not hold the {size} bytes that its header announces")
    return planes


def _numbers(planes: bytes, n: int, width: int) -> np.ndarray:
    """int32 [n,width]."""
    by_plane = np.frombuffer(planes, np.uint8).reshape(4, n * width)
    return np.ascontiguousarray(by_plane.T).view("<i4").reshape(n, width).astype(np.int32)
