"""A teacher's top-k log-probabilities, and the student's at the same tokens.

Letters: V vocabulary, K top-k; a trailing `_1` is an axis of length one. Leading axes are free.
"""

import dataclasses
import functools
import math
import numbers
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from gkdjax.losses.sharded_vocab import ShardedVocab

TAILS = ("bucket", "renormalize")
EPS = float(jnp.finfo(jnp.float32).eps)  # the least probability that float32 tells from 0 next to 1
_WHOLE = ShardedVocab()
_BLOCK = 128  # tokens of a block in `top_k`


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "logprobs", "tail_logprob"],
    meta_fields=["temperature"],
)
@dataclasses.dataclass(frozen=True)
class TopKLogprobs:
    """A teacher's K most probable next tokens, best first; a pytree, `temperature` is static.

    The logprobs are natural logs of probabilities under the teacher's whole vocabulary. An entry
    with logprob -inf is absent: it is ignored, and its id may be anything. The other ids are
    distinct and in [0, V).
    """

    ids: Array  # integer [..., K]
    logprobs: Array  # floating [..., K], nats; -inf where absent
    tail_logprob: Array | None = None  # floating [...], log(1 - P); None: derived from the K
    temperature: float = 1.0  # that the teacher's logits were divided by


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTopK:
    """What a model that wrote a text predicted where it sampled its tokens; in NumPy."""

    topk: TopKLogprobs  # [n,K]
    target_logprob: Array  # float32 [n], the sampled token's own logprob


@dataclasses.dataclass(frozen=True)
class TokenHidden:
    """The same of a model whose unembedding is in this process: dense, before the unembedding."""

    hidden: Array  # compute dtype [n,E]


class Categories(NamedTuple):
    """Log-probabilities (float32) of the same C outcomes under teacher and student."""

    log_p: Array  # [..., C] teacher
    log_q: Array  # [..., C] student
    valid: Array  # bool [..., C]; where it is False the outcome does not exist


def top_k_logprobs(
    logits: Array, k: int, temperature: float = 1.0, vocabulary: ShardedVocab = _WHOLE
) -> TopKLogprobs:
    """Finds the K most probable tokens of softmax(logits / temperature), and the mass outside them.

    Args:
      logits: floating [..., V].
      k: 1 to V; static.
      temperature: positive Python number; static.
      vocabulary: how V is sharded, within `jax.shard_map`.

    Returns:
      ids int32 [..., K], best first, the lowest id first among equals; logprobs float32 [..., K];
      tail_logprob float32 [...], a log-sum-exp over the other V - K tokens: exact however small,
      and -inf if there are none. Tokens with logit -inf are absent.

    Raises:
      ValueError: k outside [1, V]; a temperature that is not positive and finite.
      AssertionError: logits not floating.
    """
    check_temperature(temperature)
    check_logits(logits, "logits")
    part, whole = logits.shape[-1], vocabulary.size(logits.shape[-1])
    if not 1 <= k <= whole:
        raise ValueError(f"k must be between 1 and the vocabulary's {whole}, got {k}")
    # float32 before top_k: on bfloat16 XLA's CPU top_k is two orders of magnitude slower.
    scaled_V = scale(logits, temperature)
    best_K, ids_K = vocabulary.merge(*top_k(scaled_V, min(k, part)), part, k)
    # A NaN is not overwritten and spoils the row. Places that depend on the values found make the
    # search come first, so that XLA need not copy [..., V].
    found_K = jnp.where(jnp.isnan(best_K), part, vocabulary.places(ids_K, part))
    rest_V = put(scaled_V, found_K, -jnp.inf)
    parts = SplitLogits(best_K, *log_sum_exp(rest_V, vocabulary=vocabulary))
    log_p_K, log_p_rest_1 = parts.log_softmax()
    return TopKLogprobs(ids_K, log_p_K, jnp.squeeze(log_p_rest_1, -1), temperature)


def top_k(x_V: Array, k: int) -> tuple[Array, Array]:
    """Equals `jax.lax.top_k` of float32 [..., V] -> (values, int32 ids), in less time.

    Finds the largest of each block of 128, then searches the k best blocks only: the time of
    `jax.lax.top_k` grows with the number of values that it sorts.
    """
    vocabulary = x_V.shape[-1]
    blocks = -(-vocabulary // _BLOCK)
    if blocks <= 2 * k:
        values_K, ids_K = jax.lax.top_k(x_V, k)
        return values_K, ids_K.astype(jnp.int32)
    padding = [(0, 0)] * (x_V.ndim - 1) + [(0, blocks * _BLOCK - vocabulary)]
    filled = jnp.pad(x_V, padding, constant_values=-jnp.inf)
    filled = filled.reshape(*x_V.shape[:-1], blocks, _BLOCK)
    # A block that holds one of the k is itself among the k best, ties by lowest id included. In
    # ascending order of blocks the candidates are in the order of their ids.
    _, best_blocks = jax.lax.top_k(jnp.max(filled, axis=-1), k)
    best_blocks = jnp.sort(best_blocks, axis=-1)
    candidates = jnp.take_along_axis(filled, best_blocks[..., None], axis=-2)
    values_K, places_K = jax.lax.top_k(candidates.reshape(*x_V.shape[:-1], k * _BLOCK), k)
    block_K = jnp.take_along_axis(best_blocks, places_K // _BLOCK, axis=-1)
    return values_K, (block_K * _BLOCK + places_K % _BLOCK).astype(jnp.int32)


def within(teacher: TopKLogprobs, vocabulary: int | None) -> TopKLogprobs:
    """Drops the ids from `vocabulary` on: their mass is added to the tail, nothing renormalised."""
    if vocabulary is None:
        return teacher
    inside_K = jnp.asarray(teacher.ids) < vocabulary
    logprobs_K = jnp.asarray(teacher.logprobs)
    tail = teacher.tail_logprob
    if tail is not None:  # a derived tail holds that mass already
        beyond = jax.nn.logsumexp(jnp.where(inside_K, -jnp.inf, logprobs_K), axis=-1)
        tail = jnp.logaddexp(jnp.asarray(tail), beyond)
    logprobs_K = jnp.where(inside_K, logprobs_K, -jnp.inf)
    return dataclasses.replace(teacher, logprobs=logprobs_K, tail_logprob=tail)


def topk_categories(
    student_logits: Array, teacher: TopKLogprobs, tail: str, temperature: float
) -> tuple[Categories, ...]:
    """Compares both sides on the teacher's K tokens and, with "bucket", on the rest as one more."""
    check_logits(student_logits, "student_logits")
    check_teacher(student_logits.shape, teacher, tail, temperature)
    parts, _, _ = split(scale(student_logits, temperature), teacher)
    return parts_categories(parts, student_logits.shape[-1], teacher, tail, temperature)


class SplitLogits(NamedTuple):
    """Logits at the teacher's K tokens, and the log-sum-exp of the others in two parts.

    The distribution over K + 1 categories follows from them, and with it every loss: the gradient
    to a logit outside K is the gradient to the rest times the logit's share of it.
    """

    logits_K: Array  # float32 [..., K]; NaN where a valid id is out of range
    rest_max_1: Array  # float32 [..., 1]; 0 where there is no rest
    rest_log_sum_1: Array  # float32 [..., 1]; -inf where there is no rest

    def log_softmax(self, valid_K: Array | None = None) -> tuple[Array, Array]:
        """-> (log-probabilities [..., K] of the K, [..., 1] of the rest).

        log(1 - Q) of the rest is a log-sum-exp: in float32 1 - Q itself has no digits left once the
        model is sure, and its gradient vanishes.
        """
        valid_K = jnp.ones(self.logits_K.shape, bool) if valid_K is None else valid_K
        kept_K = jnp.where(valid_K, self.logits_K, -jnp.inf)
        no_rest_1 = self.rest_log_sum_1 == -jnp.inf
        rest_max_1 = jnp.where(no_rest_1, -jnp.inf, self.rest_max_1)
        max_1 = jnp.maximum(jnp.max(kept_K, axis=-1, keepdims=True), rest_max_1)
        max_1 = jax.lax.stop_gradient(jnp.where(max_1 == -jnp.inf, 0.0, max_1))
        rest_1 = (self.rest_max_1 - max_1) + self.rest_log_sum_1
        sum_K = jnp.sum(jnp.exp(kept_K - max_1), axis=-1, keepdims=True)
        log_sum_1 = jnp.log(sum_K + jnp.exp(rest_1))
        return (self.logits_K - max_1) - log_sum_1, rest_1 - log_sum_1


def split(
    scaled_V: Array, teacher: TopKLogprobs, vocabulary: ShardedVocab = _WHOLE
) -> tuple[SplitLogits, Array, Array]:
    """Splits student logits at the teacher's K tokens -> (parts, outside [..., V], places).

    `outside` is `scaled_V` with -inf at the K. `places` is V, where a write is dropped, for ids
    that are absent or in another shard of the vocabulary.
    """
    part, whole = scaled_V.shape[-1], vocabulary.size(scaled_V.shape[-1])
    ids_K = jnp.asarray(teacher.ids).astype(jnp.int32)
    # An absent entry's id may be anything. A negative id that counts must not wrap around: out of
    # range, the look-up gives NaN, which is seen.
    valid_K = teacher.logprobs != -jnp.inf
    ids_K = jnp.where(ids_K < 0, whole, ids_K)
    logits_K = vocabulary.look_up(scaled_V, jnp.where(valid_K, ids_K, 0))
    places_K = jnp.where(valid_K, vocabulary.places(ids_K, part), part)
    # Places that depend on the look-up make it come first: XLA then writes in place, where it would
    # copy [..., V] otherwise.
    places_K = jnp.where(jnp.isnan(logits_K), part, places_K)
    outside_V = put(scaled_V, places_K, -jnp.inf)
    parts = SplitLogits(logits_K, *log_sum_exp(outside_V, vocabulary=vocabulary))
    return parts, outside_V, places_K


def parts_categories(
    parts: SplitLogits, vocabulary: int, teacher: TopKLogprobs, tail: str, temperature: float
) -> tuple[Categories, ...]:
    """`topk_categories` of student logits that are split already; `check_teacher` was called."""
    log_p_K = jnp.asarray(teacher.logprobs, jnp.float32)
    valid_K = log_p_K != -jnp.inf
    if tail == "renormalize":
        retempered_K = log_p_K * (teacher.temperature / temperature)
        sides = _log_softmax(retempered_K, valid_K), _log_softmax(parts.logits_K, valid_K)
        return (Categories(*sides, valid_K),)
    log_q_K, log_q_rest_1 = parts.log_softmax(valid_K)
    if teacher.tail_logprob is None:
        rest_1 = 1.0 - jnp.sum(jnp.exp(log_p_K), axis=-1, keepdims=True)
        log_p_rest_1 = jnp.log(jnp.maximum(rest_1, EPS))
    else:
        log_p_rest_1 = jnp.expand_dims(jnp.asarray(teacher.tail_logprob, jnp.float32), -1)
    # The valid ids are distinct: their number says whether any token is left.
    has_rest_1 = jnp.sum(valid_K, axis=-1, keepdims=True) < vocabulary
    rest = Categories(log_p_rest_1, log_q_rest_1, has_rest_1)
    return Categories(log_p_K, log_q_K, valid_K), rest


def put(x_V: Array, ids_K: Array, values) -> Array:
    """Writes `values` (a number, or [..., K]) at the ids; ids out of range write nothing."""

    def one_row(x, ids, new):
        return x.at[ids].set(new, mode="drop")

    values = jnp.broadcast_to(jnp.asarray(values, x_V.dtype), ids_K.shape)
    for _ in range(ids_K.ndim - 1):
        one_row = jax.vmap(one_row)
    return one_row(x_V, ids_K, values)


def log_sum_exp(
    x_V: Array, keep_V: Array | None = None, vocabulary: ShardedVocab = _WHOLE
) -> tuple[Array, Array]:
    """(m, s) with m + s = log(sum(exp(x))) over the kept entries, both [..., 1]; s = -inf for none.

    A log-softmax is (x - m) - s: the sum m + s alone loses digits that it needs.
    """
    kept_V = x_V if keep_V is None else jnp.where(keep_V, x_V, -jnp.inf)
    max_1 = vocabulary.largest(jnp.max(kept_V, axis=-1, keepdims=True, initial=-jnp.inf))
    none_1 = max_1 == -jnp.inf
    max_1 = jnp.where(none_1, 0.0, max_1)
    sum_1 = vocabulary.add(jnp.sum(jnp.exp(kept_V - max_1), axis=-1, keepdims=True))
    # Twice where: log(0) would be right in the value and NaN in the gradient.
    return max_1, jnp.where(none_1, -jnp.inf, jnp.log(jnp.where(none_1, 1.0, sum_1)))


def scale(logits: Array, temperature: float) -> Array:
    return jnp.asarray(logits, jnp.float32) / temperature


def _log_softmax(x_K: Array, valid_K: Array) -> Array:
    max_1, log_sum_1 = log_sum_exp(x_K, valid_K)
    return jnp.where(valid_K, (x_K - max_1) - log_sum_1, 0.0)


def check_temperature(temperature: float, name: str = "temperature") -> None:
    if not isinstance(temperature, numbers.Real):
        raise ValueError(f"{name} must be a Python number, known when tracing; got {temperature!r}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{name} must be positive and finite, got {temperature}")


def check_logits(logits: Array, name: str) -> None:
    chex.assert_type(logits, float, custom_message=f"{name} must be floating")
    if logits.ndim < 1:
        raise ValueError(f"{name} needs a last axis over the vocabulary, got a scalar")


def check_teacher(
    shape: tuple[int, ...], teacher: TopKLogprobs, tail: str, temperature: float
) -> None:
    """Raises as `topk_forward_kl` does if `teacher` does not fit student logits of `shape`."""
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(map(repr, TAILS))}, got {tail!r}")
    check_temperature(temperature)
    check_temperature(teacher.temperature, "teacher.temperature")
    of_kind = {"ids": int, "logprobs": float}
    of_kind |= {"tail_logprob": float} if teacher.tail_logprob is not None else {}
    for name, kind in of_kind.items():
        message = f"teacher.{name} must be {'integers' if kind is int else 'floating'}"
        chex.assert_type(getattr(teacher, name), kind, custom_message=message)
    shapes = {f"teacher.{name}": getattr(teacher, name).shape for name in of_kind}
    k = teacher.ids.shape[-1] if teacher.ids.ndim else 0
    wanted = [(*shape[:-1], k), (*shape[:-1], k), shape[:-1]]
    if k > shape[-1] or list(shapes.values()) != wanted[: len(shapes)]:
        given = ", ".join(f"{name} {found}" for name, found in shapes.items())
        raise ValueError(
            f"student_logits {shape} need ids and logprobs [..., K], K at most {shape[-1]}, and a"
            f" tail_logprob [...], with the same leading axes; got {given}"
        )
    if tail == "bucket" and temperature != teacher.temperature:
        raise ValueError(
            f"temperature={temperature} differs from teacher.temperature={teacher.temperature}, "
            "and tail='bucket' cannot follow: how the mass outside the K tokens changes with "
            "temperature depends on probabilities that were cut off. Ask the teacher at that "
            "temperature, or use tail='renormalize'"
        )
