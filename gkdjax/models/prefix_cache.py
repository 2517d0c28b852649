"""Prefixes that many rows begin with: their keys and values are computed once, and cached."""

import collections
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gkdjax.models.decoder import Decoder, read_prefix
from gkdjax.models.kv_cache import Cache
from gkdjax.models.padding import round_up
from gkdjax.models.sampler import sample
from gkdjax.parallel.mesh import shard_rows
from gkdjax.types import Batch, Completion, SamplingParams

LEAST_TOKENS = 128  # a shorter one costs less to read again than its programs cost to compile
_NONE = np.zeros(0, np.int32)


class PrefixCache:
    """The prefixes of one frozen model; the least recently used ones make room for new ones."""

    def __init__(self, decoder: Decoder, params: dict, max_bytes: int):
        """Keeps `params`, without a copy, and the prefixes on their devices.

        A prefix of more than `max_bytes` of keys and values is read at each use.
        """
        self._decoder, self._params, self._max_bytes = decoder, params, max_bytes
        self._known: list[np.ndarray] = []  # the longest first
        self._cached: collections.OrderedDict[bytes, Cache] = collections.OrderedDict()
        self.num_reads = 0

    def register(self, groups: Iterable[Sequence[np.ndarray]]) -> None:
        """Takes the prefix of each group of prompts that is worth caching."""
        for ids in map(worth_keeping, groups):
            if ids is not None and not any(np.array_equal(ids, other) for other in self._known):
                self._known.append(ids)
        self._known.sort(key=len, reverse=True)

    def predicting_hidden(self, batch: Batch, mesh: Mesh) -> jax.Array:
        """Hidden states [B,N,E] of the teacher's view, at the positions that predict the targets.

        A prefix is left out of the rows (NumPy) that begin with it; rows of several prefixes are
        read once for each of them, if that is less than to read all of each row.
        """
        hidden_BNE = None
        for prefix, rows in self._readings(batch):
            view = shard_rows(mesh, _without(len(prefix), batch))
            found_BNE = predicting_hidden(self._decoder, self._params, *view, self._keys(prefix))
            if hidden_BNE is not None:
                here_B = shard_rows(mesh, np.isin(np.arange(len(hidden_BNE)), rows))
                found_BNE = jnp.where(here_B[:, None, None], found_BNE, hidden_BNE)
            hidden_BNE = found_BNE
        return hidden_BNE

    def _readings(self, batch: Batch) -> list[tuple[np.ndarray, Sequence[int]]]:
        """(prefix, the rows that it is right for), each of which is a pass over all rows."""
        B, T = batch.teacher_tokens_BT.shape
        # The hidden states of a prefix are not cached, and its last one may predict a target.
        used_B = np.where(batch.target_mask_BN, batch.teacher_at_BN, T).min(axis=1) + 1
        pairs = zip(batch.teacher_tokens_BT, used_B, strict=True)
        groups = self._by_prefix([tokens_T[:used] for tokens_T, used in pairs])
        dear = sum(T - len(prefix) for prefix, _ in groups) > T
        return [(_NONE, range(B))] if dear else groups

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[int],
        sampling: SamplingParams,
        **how,
    ) -> list[Completion]:
        """`models.sampler.sample`, with the prompts of one prefix computed together.

        A completion depends on what its row reads and on its seed, so the grouping changes nothing.
        """
        groups = self._by_prefix(prompts)
        longest, num_new = max(map(len, prompts), default=0), sampling.max_new_tokens
        left = [len(prompts[row]) - len(prefix) for prefix, rows in groups for row in rows]
        # Each group fills batches of its own: many groups of few rows cost more than they save.
        if len(groups) * (max(left, default=0) + num_new) > longest + num_new:
            groups = [(_NONE, range(len(prompts)))]
        completions: list[Completion | None] = [None] * len(prompts)
        for prefix, rows in groups:
            found = sample(
                self._decoder,
                self._params,
                [prompts[row][len(prefix) :] for row in rows],
                [seeds[row] for row in rows],
                sampling,
                prefix=self._keys(prefix),
                **how,
            )
            for row, completion in zip(rows, found, strict=True):
                completions[row] = completion
        return completions

    def _by_prefix(self, beginnings: Sequence[np.ndarray]) -> list[tuple[np.ndarray, list[int]]]:
        """(the longest known prefix that leaves a token, its rows); it may be empty."""
        groups: dict[bytes, tuple[np.ndarray, list[int]]] = {}
        for row, ids in enumerate(beginnings):
            fitting = (p for p in self._known if np.array_equal(ids[: len(p)], p))
            prefix = next((p for p in fitting if len(p) < len(ids)), _NONE)
            groups.setdefault(prefix.tobytes(), (prefix, []))[1].append(row)
        return list(groups.values())

    def _keys(self, ids: np.ndarray) -> Cache | None:
        """Keys and values; None for the empty prefix."""
        if not len(ids):
            return None
        key = ids.tobytes()
        if key not in self._cached:
            self.num_reads += 1
            # Padded on the left, as it would be in a row of a batch, to one of a few lengths.
            padding = round_up(len(ids), ()) - len(ids)
            tokens_1P = np.pad(ids, (padding, 0))[None]
            mask_1P = (np.arange(tokens_1P.shape[1]) >= padding)[None]
            self._cached[key] = _read(self._decoder, self._params, tokens_1P, mask_1P)
        self._cached.move_to_end(key)
        prefix = self._cached[key]
        while sum(x.nbytes for x in jax.tree.leaves([*self._cached.values()])) > self._max_bytes:
            self._cached.popitem(last=False)
        return prefix


def worth_keeping(prompts: Sequence[np.ndarray]) -> np.ndarray | None:
    """The prefix of prompts that begin alike; None of a single one, or of too few tokens."""
    if len(prompts) < 2:
        return None
    ids = common_beginning(prompts)
    return ids if len(ids) >= LEAST_TOKENS else None


def common_beginning(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """The longest beginning that all prompts share and that leaves a token of each."""
    length = min(map(len, prompts)) - 1
    first = prompts[0][:length]
    for prompt in prompts[1:]:
        differing = np.flatnonzero(first != prompt[: len(first)])
        first = first[: differing[0]] if differing.size else first
    return np.ascontiguousarray(first, np.int32)


def _without(P: int, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, mask, positions that predict) of the teacher's view after its first P tokens."""
    tokens_BT, mask_BT, at_BN = batch.teacher_tokens_BT, batch.teacher_mask_BT, batch.teacher_at_BN
    if not P:
        return tokens_BT, mask_BT, at_BN
    # Prefixes of many lengths must not leave rows of as many: each is a program to compile.
    left = tokens_BT.shape[1] - P
    filler = ((0, 0), (0, round_up(left, ()) - left))
    view = np.pad(tokens_BT[:, P:], filler), np.pad(mask_BT[:, P:], filler)
    return *view, np.maximum(at_BN - P, 0)


@functools.partial(jax.jit, static_argnames="decoder")
def predicting_hidden(
    decoder: Decoder, params, tokens_BT, mask_BT, at_BN, prefix: Cache | None = None
) -> jax.Array:
    """Hidden states [B,N,E] at the positions that predict the targets, which follow the prefix."""
    hidden_BTE = decoder.apply({"params": params}, tokens_BT, mask_BT, prefix)
    return jnp.take_along_axis(hidden_BTE, at_BN[:, :, None], axis=1)


_read = jax.jit(read_prefix, static_argnames=("decoder", "chunk"))
