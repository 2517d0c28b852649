"""Are the logprobs of scored tokens those that they were drawn with, but for a server's own noise?

In float32 they are, to 1e-4 nats. In bfloat16 reading and writing a token are other sums, and
differ by hundredths of a nat. A shift by one position moves them by whole nats.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gkdjax.teachers.server.answers import TeacherAnswer

# Nats. The most that the median of scored tokens may be from what they were drawn with, however
# exact a server is, and however noisy; between the two, its noise and half as much again.
FLOOR, CEILING = 1e-2, 0.1
_NOISES = 1.5
_FAR = 25.0  # of ten tokens one may be farther apart than so many times the most
_MOST_SLOPE = 0.05  # of log p scored over log p drawn, from 1
_FEW = 32  # entries that say nothing of a slope


@dataclasses.dataclass(frozen=True)
class Apart:
    """How far scored tokens are from drawn ones, in nats.

    Attributes:
      median: of the tokens.
      far: nine of ten are not farther.
      slope: of the logprobs of the best K, scored over drawn; 1 at one temperature.
      worst: (drawn, scored) logprob of the token that is farthest.
      tokens: how many.
    """

    median: float
    far: float
    slope: float
    worst: tuple[float, float]
    tokens: int

    def within(self, most: float) -> bool:
        """Whether the median may be so far, and the rest fits to it."""
        one_temperature = abs(self.slope - 1.0) <= _MOST_SLOPE
        return self.median <= most and self.far <= _FAR * most and one_temperature


def apart(drawn: Sequence[TeacherAnswer], scored: Sequence[TeacherAnswer]) -> Apart:
    """Compares the same tokens, drawn and then scored; one token at least."""
    before = np.concatenate([answer.target_logprob for answer in drawn])
    after = np.concatenate([answer.target_logprob for answer in scored])
    difference = np.abs(after - before)
    worst = int(difference.argmax())
    return Apart(
        float(np.median(difference)),
        float(np.quantile(difference, 0.9)),
        _slope([pair for both in zip(drawn, scored, strict=True) for pair in _rows(*both)]),
        (float(before[worst]), float(after[worst])),
        len(difference),
    )


def noise(written: Sequence[TeacherAnswer], read: Sequence[TeacherAnswer]) -> float:
    """Mean difference of the best K where the server wrote the text before, and where it read it.

    In a mean each of the few places counts, also where the rest is certain.

    Args:
      written, read: one token each, after the same text.
    """
    rows = [row for both in zip(written, read, strict=True) for row in _rows(*both)]
    every = np.concatenate([np.abs(a - b) for a, b in rows]) if rows else np.zeros(1)
    return float(every.mean())


def most(noise: float) -> float:
    """The limit of a server's median."""
    return float(np.clip(_NOISES * noise, FLOOR, CEILING))


def _rows(a: TeacherAnswer, b: TeacherAnswer) -> list[tuple[np.ndarray, np.ndarray]]:
    """The logprobs of what both list, token by token."""
    found = []
    for ids_a, logs_a, ids_b, logs_b in zip(
        *(a.top_ids, a.top_logprobs, b.top_ids, b.top_logprobs), strict=True
    ):
        other = dict(zip(ids_b[logs_b > -np.inf].tolist(), logs_b.tolist(), strict=False))
        both = [
            (x, other[i])
            for i, x in zip(ids_a.tolist(), logs_a.tolist(), strict=True)
            if x > -np.inf and i in other
        ]
        if both:
            found.append(tuple(np.asarray(both, np.float64).T))
    return found


def _slope(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Of the second over the first, each row around its own mean; 1 where too few are there."""
    if sum(len(x) for x, _ in rows) < _FEW:
        return 1.0
    x = np.concatenate([x - x.mean() for x, _ in rows])
    y = np.concatenate([y - y.mean() for _, y in rows])
    spread = float(x @ x)
    return float(x @ y) / spread if spread > 0 else 1.0
