"""Measures what a prefix costs at inference, which the baked student saves: tokens and time."""

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from gkdjax.evaluation.scoring import EvalModel
from gkdjax.models.prefix_cache import PrefixCache, worth_keeping
from gkdjax.models.sampler import sample
from gkdjax.types import SamplingParams

_ROUNDS = 5
_NEVER = -1  # an id that is not sampled: every row writes all of its tokens


def measure(
    model: EvalModel,
    without: Sequence[np.ndarray],
    with_prefix: Sequence[np.ndarray],
    *,
    new_tokens: int,
    prefix_bytes: int,
    batch_size: int,
    **how,
) -> dict:
    """Lets a model write greedily to one batch of prompts, in medians of interleaved rounds.

    Args:
      model: writes.
      without, with_prefix: prompts of one prefix as they are read without and with it; the first
        `batch_size` are used, and fewer are repeated.
      new_tokens: that each row writes.
      prefix_bytes: of keys and values that may be cached.
      batch_size: rows at once.
      how: lengths, mesh and vocab_size of `sample`.

    Returns:
      {"rows", "new_tokens", "seconds": {"without", "with", "with_kept"}}: seconds of the batch,
      prompt and new tokens; "with_kept" has the keys and values of the prefix in memory, like a
      server with a prefix cache; it is missing where the prefix is too short or too large for it.
    """
    rows = min(batch_size, len(without))
    bare, whole = without[:rows], with_prefix[:rows]
    how |= {"stop_ids": [_NEVER] * len(model.chat.stop_ids), "batch_size": batch_size}
    rest = [0] * rows, SamplingParams(new_tokens, temperature=0.0, top_p=1.0)

    ways: dict[str, Callable[[], object]] = {
        "without": lambda: sample(model.decoder, model.params, bare, *rest, **how),
        "with": lambda: sample(model.decoder, model.params, whole, *rest, **how),
    }
    cache = None
    if worth_keeping(whole) is not None:
        cache = PrefixCache(model.decoder, model.params, prefix_bytes)
        cache.register([whole])
        ways["with_kept"] = lambda: cache.sample(whole, *rest, **how)
    seconds = {name: statistics.median(times) for name, times in _rounds(ways).items()}
    if cache is not None and cache.num_reads > 1:
        del seconds["with_kept"]  # it was too large to be kept, and was read again and again
    return {"rows": batch_size, "new_tokens": new_tokens, "seconds": seconds}


def _rounds(ways: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each round by name, without the first one, which compiles."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 + _ROUNDS):
        for name, write in ways.items():
            began = time.perf_counter()
            write()
            if number:
                found[name].append(time.perf_counter() - began)
    return found
