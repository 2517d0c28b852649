"""Prefixes that many rows begin with: their keys and values are computed once, and kept."""

import collections
import functools
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from gkdjax.data.shapes import round_up
from gkdjax.models.cache import Prefix
from gkdjax.models.decoder import Decoder
from gkdjax.sampler import Sampling, sample
from gkdjax.types import Batch, Trajectory

LEAST_TOKENS = 128  # a shorter one costs less to read again than its programs cost to compile


class PrefixStore:
    """Of one frozen model; the least recently used prefixes make room for new ones."""

    def __init__(self, decoder: Decoder, params: dict, max_bytes: int):
        """Keeps `params`, without a copy.

        Args:
          decoder: the model's.
          params: its parameters, on the devices that the prefixes are to lie on.
          max_bytes: of keys and values that are kept; a larger prefix is read at each use.
        """
        self._decoder, self._params, self._max_bytes = decoder, params, max_bytes
        self._known: list[np.ndarray] = []  # the longest first
        self._kept: collections.OrderedDict[bytes, Prefix] = collections.OrderedDict()
        self.num_reads = 0

    def learn(self, groups: Iterable[Sequence[np.ndarray]]) -> None:
        """Takes the longest common beginning of each group of prompts for a prefix.

        At least one token of each prompt is left over, and prefixes of fewer than `LEAST_TOKENS`
        are let alone.
        """
        for prompts in groups:
            ids = common_beginning(prompts)
            new = not any(np.array_equal(ids, other) for other in self._known)
            if len(prompts) > 1 and len(ids) >= LEAST_TOKENS and new:
                self._known.append(ids)
        self._known.sort(key=len, reverse=True)

    def teacher_view(self, batch: Batch):
        """-> (prefix or None, tokens_BT, mask_BT, at_BN): the teacher's view without the prefix.

        Args:
          batch: NumPy arrays. A prefix is left out if all rows begin with it.
        """
        tokens_BT, at_BN = batch.teacher_tokens_BT, batch.teacher_at_BN
        # The hidden states of the prefix are gone, and the last one predicts the first target.
        first_used = at_BN[batch.target_mask_BN].min(initial=tokens_BT.shape[1])
        ids = self._beginning_of([row[: first_used + 1] for row in tokens_BT])
        P = len(ids)
        if not P:
            return None, tokens_BT, batch.teacher_mask_BT, at_BN
        # Prefixes of many lengths must not leave rows of as many: each is a program to compile.
        left = tokens_BT.shape[1] - P
        filler = ((0, 0), (0, round_up(left, ()) - left))
        view = np.pad(tokens_BT[:, P:], filler), np.pad(batch.teacher_mask_BT[:, P:], filler)
        return self._read(ids), *view, np.maximum(at_BN - P, 0)

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[int],
        sampling: Sampling,
        **how,
    ) -> list[Trajectory]:
        """`sampler.sample`, with the prompts of one prefix computed together.

        A row's draws depend on what it reads and on its seed, so the grouping changes nothing.
        """
        written: list[Trajectory | None] = [None] * len(prompts)
        for ids, rows in self._groups(prompts, sampling.max_new_tokens):
            found = sample(
                self._decoder,
                self._params,
                [prompts[row][len(ids) :] for row in rows],
                [seeds[row] for row in rows],
                sampling,
                prefix=self._read(ids),
                **how,
            )
            for row, trajectory in zip(rows, found, strict=True):
                written[row] = trajectory
        return written

    def _groups(self, prompts: Sequence[np.ndarray], num_new: int):
        """(prefix, rows) of prompts that are computed together."""
        groups: dict[bytes, list[int]] = {}
        prefixes = [self._beginning_of([np.asarray(prompt)]) for prompt in prompts]
        for row, prefix in enumerate(prefixes):
            groups.setdefault(prefix.tobytes(), []).append(row)
        pairs = zip(prompts, prefixes, strict=True)
        left = max((len(prompt) - len(prefix) for prompt, prefix in pairs), default=0)
        # Each group fills batches of its own: many groups of few rows cost more than they save.
        if len(groups) * (left + num_new) > max(map(len, prompts), default=0) + num_new:
            return [(np.zeros(0, np.int32), range(len(prompts)))]
        return [(prefixes[rows[0]], rows) for rows in groups.values()]

    def _beginning_of(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """The longest known prefix of all rows that leaves a token of each; empty for none."""
        shortest = min(map(len, rows))
        for prefix in self._known:
            P = len(prefix)
            if shortest > P and all(np.array_equal(row[:P], prefix) for row in rows):
                return prefix
        return np.zeros(0, np.int32)

    def _read(self, ids: np.ndarray) -> Prefix | None:
        """Keys and values; None for the empty prefix."""
        if not len(ids):
            return None
        key = ids.tobytes()
        if key not in self._kept:
            self.num_reads += 1
            # Padded on the left, as it would be a row of a batch, to one of a few lengths.
            padding = round_up(len(ids), ()) - len(ids)
            tokens_1P = np.pad(ids, (padding, 0))[None]
            mask_1P = (np.arange(tokens_1P.shape[1]) >= padding)[None]
            self._kept[key] = _read(self._decoder, self._params, tokens_1P, mask_1P)
        self._kept.move_to_end(key)
        prefix = self._kept[key]
        while sum(map(_nbytes, self._kept.values())) > self._max_bytes:
            self._kept.popitem(last=False)
        return prefix


def common_beginning(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """The longest beginning that all prompts share and that leaves a token of each."""
    length = min(map(len, prompts)) - 1
    first = prompts[0][:length]
    for prompt in prompts[1:]:
        differing = np.flatnonzero(first != prompt[: len(first)])
        first = first[: differing[0]] if differing.size else first
    return np.ascontiguousarray(first, np.int32)


@functools.partial(jax.jit, static_argnames="decoder")
def _read(decoder: Decoder, params: dict, tokens_1P, mask_1P) -> Prefix:
    return decoder.apply({"params": params}, tokens_1P, mask_1P, method="read_prefix")


def _nbytes(prefix: Prefix) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(prefix))
