"""The teacher's K best log-probabilities, and the student looked up at the same tokens.

Letters: V vocabulary, K top-k; a trailing `_1` is a kept axis of length one. Leading axes are free.
"""

import dataclasses
import functools
import math
import numbers
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gkdjax.losses.sharded_vocab import ShardedVocab

TAILS = ("bucket", "renormalize")

# The least probability that float32 can tell from 0 next to 1: the worth of a "1 - P" that cancels.
EPS = float(jnp.finfo(jnp.float32).eps)

_WHOLE = ShardedVocab()

_BLOCK = 128  # tokens whose largest is found before any are put in order


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "logprobs", "tail_logprob"],
    meta_fields=["temperature"],
)
@dataclasses.dataclass(frozen=True)
class TopKLogprobs:
    """What a teacher says about the next token.

    Natural logs of probabilities under its whole vocabulary, best first. Entries with logprob -inf
    are absent: they count for nothing and their id may be anything. The ids of the others are
    distinct and in [0, V). A pytree; `temperature` is static.
    """

    ids: jax.Array  # integer [..., K]
    logprobs: jax.Array  # floating [..., K], nats; -inf where absent
    tail_logprob: jax.Array | None = None  # floating [...], log(1 - P); None: derived from the K
    temperature: float = 1.0  # what the teacher's logits were divided by


class Categories(NamedTuple):
    """The same C outcomes on both sides, float32 log-probabilities, and which of them exist."""

    log_p: jax.Array  # [..., C] teacher
    log_q: jax.Array  # [..., C] student
    valid: jax.Array  # bool [..., C]; the rest counts for nothing, whatever it holds


def top_k_logprobs(
    logits: jax.Array, k: int, temperature: float = 1.0, vocabulary: ShardedVocab = _WHOLE
) -> TopKLogprobs:
    """The K most probable tokens of softmax(logits / temperature), and the mass outside them.

    Args:
      logits: floating [..., V].
      k: how many, 1 to V; static.
      temperature: positive Python number; static.
      vocabulary: how it is cut, where V is a part of it.

    Returns:
      ids int32 [..., K], best first and the lowest id first among equals; logprobs float32 [..., K]
      and tail_logprob float32 [...], in nats. The tail is a log-sum-exp over the other V - K
      tokens, so it is exact however small; -inf where nothing is left. Tokens with logit -inf come
      out absent.

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
    # NaN stays where it is and spoils the row; and what is written depends on what was found, so
    # that the search comes first and XLA need not copy [..., V].
    found_K = jnp.where(jnp.isnan(best_K), part, vocabulary.places(ids_K, part))
    rest_V = put(scaled_V, found_K, -jnp.inf)
    parts = SplitLogits(best_K, *log_sum_exp(rest_V, vocabulary=vocabulary))
    log_p_K, log_p_rest_1 = parts.log_softmax()
    return TopKLogprobs(ids_K, log_p_K, jnp.squeeze(log_p_rest_1, -1), temperature)


def top_k(x_V: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of float32 [..., V] -> (values, ids int32), the lowest id first among equals.

    The largest of each block of 128 first, then a search within the k best blocks: the same answer
    as `jax.lax.top_k`, whose time grows with everything it has to put in order.
    """
    vocabulary = x_V.shape[-1]
    blocks = -(-vocabulary // _BLOCK)
    if blocks <= 2 * k:
        values_K, ids_K = jax.lax.top_k(x_V, k)
        return values_K, ids_K.astype(jnp.int32)
    filled = jnp.pad(
        x_V,
        [(0, 0)] * (x_V.ndim - 1) + [(0, blocks * _BLOCK - vocabulary)],
        constant_values=-jnp.inf,
    )
    filled = filled.reshape(*x_V.shape[:-1], blocks, _BLOCK)
    # A block that holds one of the k is itself among the k best, ties by lowest id included. In
    # ascending order the candidates' places are in the order of their ids.
    _, best_blocks = jax.lax.top_k(jnp.max(filled, axis=-1), k)
    best_blocks = jnp.sort(best_blocks, axis=-1)
    candidates = jnp.take_along_axis(filled, best_blocks[..., None], axis=-2)
    values_K, places_K = jax.lax.top_k(candidates.reshape(*x_V.shape[:-1], k * _BLOCK), k)
    block_K = jnp.take_along_axis(best_blocks, places_K // _BLOCK, axis=-1)
    return values_K, (block_K * _BLOCK + places_K % _BLOCK).astype(jnp.int32)


def within(teacher: TopKLogprobs, vocabulary: int | None) -> TopKLogprobs:
    """The same, of ids below `vocabulary` alone: the mass of the others becomes part of the tail.

    With p the teacher's probabilities and S the ids below `vocabulary`, the K become those in S,
    and tail' = tail + sum of p over the K that are not in S. Nothing is renormalised.
    """
    if vocabulary is None:
        return teacher
    inside_K = jnp.asarray(teacher.ids) < vocabulary
    logprobs_K = jnp.asarray(teacher.logprobs)
    tail = teacher.tail_logprob
    if tail is not None:  # else it is what the others leave
        beyond = jax.nn.logsumexp(jnp.where(inside_K, -jnp.inf, logprobs_K), axis=-1)
        tail = jnp.logaddexp(jnp.asarray(tail), beyond)
    logprobs_K = jnp.where(inside_K, logprobs_K, -jnp.inf)
    return dataclasses.replace(teacher, logprobs=logprobs_K, tail_logprob=tail)


def topk_categories(
    student_logits: jax.Array, teacher: TopKLogprobs, tail: str, temperature: float
) -> tuple[Categories, ...]:
    """Both sides on the teacher's K tokens and, for "bucket", on all the rest as one more."""
    check_logits(student_logits, "student_logits")
    check_teacher(student_logits.shape, teacher, tail, temperature)
    parts, _, _ = split(scale(student_logits, temperature), teacher)
    return parts_categories(parts, student_logits.shape[-1], teacher, tail, temperature)


class SplitLogits(NamedTuple):
    """Logits as the K that a teacher names and the log-sum-exp of all the others.

    A distribution over K + 1 categories follows from it, and with it every loss; so the gradient to
    a logit outside K is the gradient to `rest_1` times its share of the rest.
    """

    logits_K: jax.Array  # float32 [..., K]; NaN where a valid id is out of range
    rest_max_1: jax.Array  # float32 [..., 1]; 0 where there is no rest
    rest_log_sum_1: jax.Array  # float32 [..., 1]; -inf where there is no rest

    def log_softmax(self, valid_K: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """-> (log-probabilities [..., K] of the K, [..., 1] of the rest).

        The rest's log(1 - Q) is a log-sum-exp: 1 - Q itself has no digits left in float32 once the
        model is sure, and its gradient vanishes.
        """
        valid_K = jnp.ones(self.logits_K.shape, bool) if valid_K is None else valid_K
        kept_K = jnp.where(valid_K, self.logits_K, -jnp.inf)
        no_rest_1 = self.rest_log_sum_1 == -jnp.inf
        rest_max_1 = jnp.where(no_rest_1, -jnp.inf, self.rest_max_1)
        max_1 = jnp.maximum(jnp.max(kept_K, axis=-1, keepdims=True), rest_max_1)
        max_1 = jax.lax.stop_gradient(jnp.where(max_1 == -jnp.inf, 0.0, max_1))
        rest_1 = (self.rest_max_1 - max_1) + self.rest_log_sum_1
        log_sum_1 = jnp.log(
            jnp.sum(jnp.exp(kept_K - max_1), axis=-1, keepdims=True) + jnp.exp(rest_1)
        )
        return (self.logits_K - max_1) - log_sum_1, rest_1 - log_sum_1


def split(
    scaled_V: jax.Array, teacher: TopKLogprobs, vocabulary: ShardedVocab = _WHOLE
) -> tuple[SplitLogits, jax.Array, jax.Array]:
    """Student logits at the teacher's K tokens and the others -> (parts, outside [..., V], places).

    `outside` is `scaled_V` with -inf at the K; `places` has V where an id is absent, or in another
    part of the vocabulary, so that writing there writes nothing.
    """
    part, whole = scaled_V.shape[-1], vocabulary.size(scaled_V.shape[-1])
    ids_K = jnp.asarray(teacher.ids).astype(jnp.int32)
    # An absent entry's id may be anything; a negative one that counts must not wrap around: out of
    # range, the look-up fills in NaN, which is seen.
    valid_K = teacher.logprobs != -jnp.inf
    ids_K = jnp.where(ids_K < 0, whole, ids_K)
    logits_K = vocabulary.look_up(scaled_V, jnp.where(valid_K, ids_K, 0))
    places_K = jnp.where(valid_K, vocabulary.places(ids_K, part), part)
    # That the ids depend on what was looked up puts the look-up first: XLA then writes in place,
    # where it would copy [..., V] otherwise.
    places_K = jnp.where(jnp.isnan(logits_K), part, places_K)
    outside_V = put(scaled_V, places_K, -jnp.inf)
    return (
        SplitLogits(logits_K, *log_sum_exp(outside_V, vocabulary=vocabulary)),
        outside_V,
        places_K,
    )


def parts_categories(
    parts: SplitLogits, vocabulary: int, teacher: TopKLogprobs, tail: str, temperature: float
) -> tuple[Categories, ...]:
    """`topk_categories` of a student whose logits are split already; `check_teacher` was called."""
    log_p_K = jnp.asarray(teacher.logprobs, jnp.float32)
    valid_K = log_p_K != -jnp.inf
    if tail == "renormalize":
        retempered_K = log_p_K * (teacher.temperature / temperature)
        sides = _log_softmax(retempered_K, valid_K), _log_softmax(parts.logits_K, valid_K)
        return (Categories(*sides, valid_K),)
    log_q_K, log_q_rest_1 = parts.log_softmax(valid_K)
    log_p_rest_1 = _teacher_tail(teacher.tail_logprob, log_p_K)
    # The valid ids are distinct, so that their number says whether any token is left.
    has_rest_1 = jnp.sum(valid_K, axis=-1, keepdims=True) < vocabulary
    return (
        Categories(log_p_K, log_q_K, valid_K),
        Categories(log_p_rest_1, log_q_rest_1, has_rest_1),
    )


def put(x_V: jax.Array, ids_K: jax.Array, values) -> jax.Array:
    """`x_V` with `values` (a number, or [..., K]) at the ids; ids out of range write nothing."""

    def one_row(x, ids, new):
        return x.at[ids].set(new, mode="drop")

    values = jnp.broadcast_to(jnp.asarray(values, x_V.dtype), ids_K.shape)
    for _ in range(ids_K.ndim - 1):
        one_row = jax.vmap(one_row)
    return one_row(x_V, ids_K, values)


def log_sum_exp(
    x_V: jax.Array, keep_V: jax.Array | None = None, vocabulary: ShardedVocab = _WHOLE
) -> tuple[jax.Array, jax.Array]:
    """(m, s) with m + s = log(sum(exp(x))) over the kept entries, both [..., 1]; s = -inf for none.

    In two parts because their sum loses digits that a log-softmax needs: it is (x - m) - s.
    """
    kept_V = x_V if keep_V is None else jnp.where(keep_V, x_V, -jnp.inf)
    max_1 = vocabulary.largest(jnp.max(kept_V, axis=-1, keepdims=True, initial=-jnp.inf))
    none_1 = max_1 == -jnp.inf
    max_1 = jnp.where(none_1, 0.0, max_1)
    sum_1 = vocabulary.add(jnp.sum(jnp.exp(kept_V - max_1), axis=-1, keepdims=True))
    # Twice where: log(0) would be right in the value and NaN in the gradient.
    return max_1, jnp.where(none_1, -jnp.inf, jnp.log(jnp.where(none_1, 1.0, sum_1)))


def scale(logits: jax.Array, temperature: float) -> jax.Array:
    return jnp.asarray(logits, jnp.float32) / temperature


def check_temperature(temperature: float, name: str = "temperature") -> None:
    if not isinstance(temperature, numbers.Real):
        raise ValueError(f"{name} must be a Python number, known when tracing; got {temperature!r}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{name} must be positive and finite, got {temperature}")


def check_logits(logits: jax.Array, name: str) -> None:
    chex.assert_type(logits, float, custom_message=f"{name} must be floating")
    if logits.ndim < 1:
        raise ValueError(f"{name} needs a last axis over the vocabulary, got a scalar")


def _log_softmax(x_K: jax.Array, valid_K: jax.Array) -> jax.Array:
    max_1, log_sum_1 = log_sum_exp(x_K, valid_K)
    return jnp.where(valid_K, (x_K - max_1) - log_sum_1, 0.0)


def _teacher_tail(tail_logprob: jax.Array | None, logprobs_K: jax.Array) -> jax.Array:
    if tail_logprob is not None:
        return jnp.expand_dims(jnp.asarray(tail_logprob, jnp.float32), -1)
    rest_1 = 1.0 - jnp.sum(jnp.exp(logprobs_K), axis=-1, keepdims=True)
    return jnp.log(jnp.maximum(rest_1, EPS))


def check_teacher(
    shape: tuple[int, ...], teacher: TopKLogprobs, tail: str, temperature: float
) -> None:
    """Raises as `topk_forward_kl` does if `teacher` cannot be met by student logits of `shape`."""
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(map(repr, TAILS))}, got {tail!r}")
    check_temperature(temperature)
    check_temperature(teacher.temperature, "teacher.temperature")
    _check_shapes(shape, teacher)
    if tail == "bucket" and temperature != teacher.temperature:
        raise ValueError(
            f"temperature={temperature} differs from teacher.temperature={teacher.temperature}, "
            "and tail='bucket' cannot follow: how the mass outside the K tokens changes with "
            "temperature depends on probabilities that were cut off. Ask the teacher at that "
            "temperature, or use tail='renormalize'"
        )


def _check_shapes(student_shape: tuple[int, ...], teacher: TopKLogprobs) -> None:
    chex.assert_type(teacher.ids, int, custom_message="teacher.ids must be integers")
    chex.assert_type(teacher.logprobs, float, custom_message="teacher.logprobs must be floating")
    chex.assert_rank(
        [teacher.ids, teacher.logprobs],
        len(student_shape),
        custom_message="teacher.ids and teacher.logprobs need the rank of student_logits",
    )
    chex.assert_equal_shape(
        [teacher.ids, teacher.logprobs], custom_message="teacher.ids against teacher.logprobs"
    )
    leading, vocabulary = student_shape[:-1], student_shape[-1]
    if teacher.ids.shape[:-1] != leading:
        raise ValueError(
            f"the leading axes of student_logits {leading} and teacher.ids "
            f"{teacher.ids.shape[:-1]} differ"
        )
    if teacher.ids.shape[-1] > vocabulary:
        raise ValueError(
            f"teacher.ids holds K={teacher.ids.shape[-1]} tokens, more than the {vocabulary} of "
            "student_logits"
        )
    if teacher.tail_logprob is not None:
        chex.assert_type(
            teacher.tail_logprob, float, custom_message="teacher.tail_logprob must be floating"
        )
        chex.assert_shape(
            teacher.tail_logprob, leading, custom_message="teacher.tail_logprob, one a token"
        )
