"""Prefixes that many rows begin with: their keys and values are computed once, and kept."""

import collections
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gkdjax.models.decoder import Decoder, read_prefix
from gkdjax.models.kv_cache import Prefix
from gkdjax.models.padding import round_up
from gkdjax.models.sampler import sample
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.types import Batch, Completion, SamplingParams

LEAST_TOKENS = 128  # a shorter one costs less to read again than its programs cost to compile


class PrefixCache:
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

    def register(self, groups: Iterable[Sequence[np.ndarray]]) -> None:
        """Takes the prefix of each group of prompts that is worth keeping."""
        for ids in map(worth_keeping, groups):
            if ids is not None and not any(np.array_equal(ids, other) for other in self._known):
                self._known.append(ids)
        self._known.sort(key=len, reverse=True)

    def predicting_hidden(self, batch: Batch, mesh: Mesh) -> jax.Array:
        """Hidden states [B,N,E] of the teacher's view, at the positions that predict the targets.

        Args:
          batch: NumPy arrays. A prefix is left out of the rows that begin with it; rows of several
            prefixes are read once for each of them, if that is less than to read all of each row.
          mesh: its devices share the rows.
        """
        hidden_BNE = None
        for ids, rows_B in self._readings(batch):
            view = parallel_mesh.shard_rows(mesh, _without(len(ids), batch))
            found_BNE = predicting_hidden(self._decoder, self._params, *view, self._read(ids))
            if hidden_BNE is not None:
                rows_B = parallel_mesh.shard_rows(mesh, rows_B)
                found_BNE = jnp.where(rows_B[:, None, None], found_BNE, hidden_BNE)
            hidden_BNE = found_BNE
        return hidden_BNE

    def _readings(self, batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
        """(prefix, bool [B]: the rows that it is right for), of all rows together."""
        tokens_BT = batch.teacher_tokens_BT
        B, T = tokens_BT.shape
        # The hidden states of the prefix are gone, and the last one predicts the first target.
        first_used_B = np.where(batch.target_mask_BN, batch.teacher_at_BN, T).min(axis=1)
        readings: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        for row, (tokens_T, first_used) in enumerate(zip(tokens_BT, first_used_B, strict=True)):
            ids = self._beginning_of(tokens_T[: first_used + 1])
            _, rows_B = readings.setdefault(ids.tobytes(), (ids, np.zeros(B, bool)))
            rows_B[row] = True
        if sum(T - len(ids) for ids, _ in readings.values()) > T:
            return [(np.zeros(0, np.int32), np.ones(B, bool))]
        return list(readings.values())

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[int],
        sampling: SamplingParams,
        **how,
    ) -> list[Completion]:
        """`models.sampler.sample`, with the prompts of one prefix computed together.

        A row's draws depend on what it reads and on its seed, so the grouping changes nothing.
        """
        written: list[Completion | None] = [None] * len(prompts)
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
            for row, completion in zip(rows, found, strict=True):
                written[row] = completion
        return written

    def _groups(self, prompts: Sequence[np.ndarray], num_new: int):
        """(prefix, rows) of prompts that are computed together."""
        groups: dict[bytes, list[int]] = {}
        prefixes = [self._beginning_of(np.asarray(prompt)) for prompt in prompts]
        for row, prefix in enumerate(prefixes):
            groups.setdefault(prefix.tobytes(), []).append(row)
        pairs = zip(prompts, prefixes, strict=True)
        left = max((len(prompt) - len(prefix) for prompt, prefix in pairs), default=0)
        # Each group fills batches of its own: many groups of few rows cost more than they save.
        if len(groups) * (left + num_new) > max(map(len, prompts), default=0) + num_new:
            return [(np.zeros(0, np.int32), range(len(prompts)))]
        return [(prefixes[rows[0]], rows) for rows in groups.values()]

    def _beginning_of(self, tokens_T: np.ndarray) -> np.ndarray:
        """The longest known prefix of a row that leaves a token of it; empty for none."""
        for prefix in self._known:
            P = len(prefix)
            if len(tokens_T) > P and np.array_equal(tokens_T[:P], prefix):
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
    """(tokens, mask, positions that predict) of the teacher's view behind its first P tokens."""
    tokens_BT, mask_BT, at_BN = batch.teacher_tokens_BT, batch.teacher_mask_BT, batch.teacher_at_BN
    if not P:
        return tokens_BT, mask_BT, at_BN
    # Prefixes of many lengths must not leave rows of as many: each is a program to compile.
    left = tokens_BT.shape[1] - P
    filler = ((0, 0), (0, round_up(left, ()) - left))
    return (
        np.pad(tokens_BT[:, P:], filler),
        np.pad(mask_BT[:, P:], filler),
        np.maximum(at_BN - P, 0),
    )


@functools.partial(jax.jit, static_argnames="decoder")
def predicting_hidden(
    decoder: Decoder, params, tokens_BT, mask_BT, at_BN, prefix: Prefix | None = None
) -> jax.Array:
    """Hidden states [B,N,E] at the positions that predict the targets, which follow the prefix."""
    hidden_BTE = decoder.apply({"params": params}, tokens_BT, mask_BT, prefix)
    return jnp.take_along_axis(hidden_BTE, at_BN[:, :, None], axis=1)


_read = jax.jit(read_prefix, static_argnames=("decoder", "chunk"))


def _nbytes(prefix: Prefix) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(prefix))
