"""Whether scored tokens have the logprobs with which they were sampled, but for a server's noise.

In float32 they have, to 1e-4 nats. In bfloat16 reading and writing a token are different sums, and
differ by hundredths of a nat. A shift by one position moves logprobs by whole nats.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gkdjax.teachers.server.answers import TeacherAnswer

# Nats, of the median difference: allowed for the most exact, and for the noisiest server.
FLOOR, CEILING = 1e-2, 0.1
_NOISE_FACTOR = 1.5  # between the two, times the server's noise
_FAR_FACTOR = 25.0  # one token in ten may be farther than so many times the median allowed
_MAX_SLOPE_ERROR = 0.05
_MIN_SLOPE_ENTRIES = 32


class Agreement(NamedTuple):
    """The difference of sampled and scored logprobs, in nats."""

    median: float
    far: float  # quantile 0.9
    slope: float  # of scored over sampled logprobs; 1 at the same temperature
    worst: tuple[float, float]  # (sampled, scored) logprob of the token with the largest difference
    tokens: int

    def within(self, most: float) -> bool:
        """Whether the median is at most this, and the other figures fit."""
        same_temperature = abs(self.slope - 1.0) <= _MAX_SLOPE_ERROR
        return self.median <= most and self.far <= _FAR_FACTOR * most and same_temperature


def compare(sampled: Sequence[TeacherAnswer], scored: Sequence[TeacherAnswer]) -> Agreement:
    """Compares the same tokens, one at least, sampled and then scored."""
    before = np.concatenate([answer.target_logprob for answer in sampled])
    after = np.concatenate([answer.target_logprob for answer in scored])
    difference = np.abs(after - before)
    worst = int(difference.argmax())
    return Agreement(
        median=float(np.median(difference)),
        far=float(np.quantile(difference, 0.9)),
        slope=_slope(_common_logprobs(sampled, scored)),
        worst=(float(before[worst]), float(after[worst])),
        tokens=len(difference),
    )


def noise(written: Sequence[TeacherAnswer], read: Sequence[TeacherAnswer]) -> float:
    """Mean difference of the best K where the server wrote the text before, and where it read it.

    Unlike a median, it counts each of the few places.
    """
    rows = _common_logprobs(written, read)
    return float(np.concatenate([np.abs(a - b) for a, b in rows]).mean()) if rows else 0.0


def max_median(noise: float) -> float:
    """The largest median that is allowed at this noise."""
    return float(np.clip(_NOISE_FACTOR * noise, FLOOR, CEILING))


def _common_logprobs(
    first: Sequence[TeacherAnswer], second: Sequence[TeacherAnswer]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each token the logprobs of those best K that both answers list."""
    found = []
    for a, b in zip(first, second, strict=True):
        for ids_a, logs_a, ids_b, logs_b in zip(
            *(a.top_ids, a.top_logprobs, b.top_ids, b.top_logprobs), strict=True
        ):
            there_a, there_b = logs_a > -np.inf, logs_b > -np.inf
            _, at_a, at_b = np.intersect1d(ids_a[there_a], ids_b[there_b], return_indices=True)
            if len(at_a):
                pair = logs_a[there_a][at_a], logs_b[there_b][at_b]
                found.append(tuple(logs.astype(np.float64) for logs in pair))
    return found


def _slope(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Slope of the second over the first, each row around its own mean; 1 for too few entries."""
    if sum(len(x) for x, _ in rows) < _MIN_SLOPE_ENTRIES:
        return 1.0
    x = np.concatenate([x - x.mean() for x, _ in rows])
    y = np.concatenate([y - y.mean() for _, y in rows])
    return float(x @ y / (x @ x)) if x.any() else 1.0
