"""Every random draw of a run is a function of (seed, purpose, numbers), never of a state."""

import zlib

import numpy as np


def fold(seed: int, purpose: str, *numbers: int) -> int:
    """Returns an int in [0, 2**32) for a purpose and its numbers, such as a step and a row id.

    One purpose always has the same count of numbers: zeros at the end make no difference.
    """
    return int(_sequence(seed, purpose, numbers).generate_state(1)[0])


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    return np.random.default_rng(_sequence(seed, purpose, numbers))


def _sequence(seed: int, purpose: str, numbers: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *numbers])
