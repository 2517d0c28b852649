"""What a prefix costs at inference, which the baked student saves: tokens, and time, measured."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from gkdjax.evaluation.scoring import EvalModel
from gkdjax.models.prefix_cache import PrefixCache, worth_keeping
from gkdjax.models.sampler import sample
from gkdjax.types import SamplingParams

_ROUNDS = 5
_NEVER = -1  # an id that is not drawn: every row writes all of its tokens


class Asked(NamedTuple):
    """Prompts of one prefix, rendered."""

    without: Sequence[np.ndarray]  # what the student reads
    with_prefix: Sequence[np.ndarray]


def measure(
    reader: EvalModel,
    asked: Asked,
    *,
    new_tokens: int,
    batch_size: int,
    lengths: Sequence[int],
    mesh: Mesh,
    vocab_size: int,
    prefix_bytes: int,
) -> dict:
    """Lets a model write greedily to one batch of prompts, again and again.

    The ways are tried in turn, once to compile and then five times: medians of interleaved rounds.

    Args:
      reader: the model.
      asked: its prompts; the first `batch_size` are used, and fewer are repeated to fill the batch.
      new_tokens: that each row writes.
      batch_size: rows at once.
      lengths: padded prompt lengths.
      mesh: its devices share the rows.
      vocab_size: ids below it are drawn.
      prefix_bytes: of keys and values that may be kept.

    Returns:
      {"rows", "new_tokens", "seconds": {"without", "with", "with_kept"}}: seconds of the batch,
      prompt and new tokens; "with_kept" has the keys and values of the prefix in memory, as a
      server with a prefix cache; it is missing where the prefix is too short to be kept.
    """
    rows = min(batch_size, len(asked.without))
    bare, whole = asked.without[:rows], asked.with_prefix[:rows]
    how = {
        "stop_ids": [_NEVER] * len(reader.chat.stop_ids),
        "batch_size": batch_size,
        "lengths": lengths,
        "mesh": mesh,
        "vocab_size": vocab_size,
    }
    greedy, seeds = SamplingParams(new_tokens, temperature=0.0, top_p=1.0), [0] * rows

    def write(prompts) -> None:
        sample(reader.decoder, reader.params, prompts, seeds, greedy, **how)

    ways: dict[str, Callable[[], object]] = {
        "without": lambda: write(bare),
        "with": lambda: write(whole),
    }
    store = None
    if worth_keeping(whole) is not None:
        store = PrefixCache(reader.decoder, reader.params, prefix_bytes)
        store.register([whole])
        ways["with_kept"] = lambda: store.sample(whole, seeds, greedy, **how)
    seconds = {name: statistics.median(times) for name, times in _rounds(ways).items()}
    if store is not None and store.num_reads > 1:
        del seconds["with_kept"]  # it was larger than what may be kept, and read again and again
    return {"rows": batch_size, "new_tokens": new_tokens, "seconds": seconds}


def _rounds(ways: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Name -> seconds of each round; the first one, which compiles, is left out."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 + _ROUNDS):
        for name, write in ways.items():
            began = time.perf_counter()
            write()
            if number:
                found[name].append(time.perf_counter() - began)
    return found
