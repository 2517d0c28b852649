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

TAILS = ("bucket", "renormalize")

# The least probability that float32 can tell from 0 next to 1: the worth of a "1 - P" that cancels.
EPS = float(jnp.finfo(jnp.float32).eps)


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


def top_k_logprobs(logits: jax.Array, k: int, temperature: float = 1.0) -> TopKLogprobs:
    """The K most probable tokens of softmax(logits / temperature), and the mass outside them.

    Args:
      logits: floating [..., V].
      k: how many, 1 to V; static.
      temperature: positive Python number; static.

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
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must be between 1 and the vocabulary's {logits.shape[-1]}, got {k}")
    # float32 before top_k: on bfloat16 XLA's CPU top_k is two orders of magnitude slower.
    scaled_V = scale(logits, temperature)
    max_1, log_sum_1 = log_sum_exp(scaled_V)
    best_K, ids_K = jax.lax.top_k(scaled_V, k)
    outside_V = ~membership(ids_K, jnp.ones(ids_K.shape, bool), logits.shape[-1])
    rest_max_1, rest_log_sum_1 = log_sum_exp(scaled_V, outside_V)
    tail_1 = (rest_max_1 - max_1) + rest_log_sum_1 - log_sum_1
    return TopKLogprobs(
        ids=ids_K.astype(jnp.int32),
        logprobs=(best_K - max_1) - log_sum_1,
        tail_logprob=jnp.squeeze(tail_1, -1),
        temperature=temperature,
    )


def topk_categories(
    student_logits: jax.Array, teacher: TopKLogprobs, tail: str, temperature: float
) -> tuple[Categories, ...]:
    """Both sides on the teacher's K tokens and, for "bucket", on all the rest as one more."""
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(map(repr, TAILS))}, got {tail!r}")
    check_temperature(temperature)
    check_temperature(teacher.temperature, "teacher.temperature")
    _check_shapes(student_logits, teacher)
    if tail == "bucket" and temperature != teacher.temperature:
        raise ValueError(
            f"temperature={temperature} differs from teacher.temperature={teacher.temperature}, "
            "and tail='bucket' cannot follow: how the mass outside the K tokens changes with "
            "temperature depends on probabilities that were cut off. Ask the teacher at that "
            "temperature, or use tail='renormalize'"
        )
    student_V = scale(student_logits, temperature)
    vocabulary = student_V.shape[-1]
    logprobs_K = jnp.asarray(teacher.logprobs, jnp.float32)
    valid_K = logprobs_K != -jnp.inf
    ids_K = jnp.asarray(teacher.ids).astype(jnp.int32)
    # An absent entry's id may be anything; a negative one that counts must not wrap around: out of
    # range, the look-up fills in NaN, which is seen.
    ids_K = jnp.where(valid_K, jnp.where(ids_K < 0, vocabulary, ids_K), 0)
    student_K = jnp.take_along_axis(student_V, ids_K, axis=-1, mode="fill")

    if tail == "renormalize":
        retempered_K = logprobs_K * (teacher.temperature / temperature)
        log_p_K = _log_softmax(retempered_K, valid_K)
        return (Categories(log_p_K, _log_softmax(student_K, valid_K), valid_K),)

    max_1, log_sum_1 = log_sum_exp(student_V)
    outside_V = ~membership(ids_K, valid_K, vocabulary)
    inside = Categories(logprobs_K, (student_K - max_1) - log_sum_1, valid_K)
    log_p_1 = _teacher_tail(teacher.tail_logprob, logprobs_K)
    return inside, rest_category(log_p_1, student_V, outside_V, max_1, log_sum_1)


def rest_category(
    log_p_1: jax.Array,
    student_V: jax.Array,
    outside_V: jax.Array,
    max_1: jax.Array,
    log_sum_1: jax.Array,
) -> Categories:
    """All tokens of `outside_V` as one category; not valid where there is none.

    The student's log(1 - Q) is a log-sum-exp over those tokens: 1 - Q itself has no digits left in
    float32 once the student is sure, and its gradient vanishes.
    """
    rest_max_1, rest_log_sum_1 = log_sum_exp(student_V, outside_V)
    log_q_1 = (rest_max_1 - max_1) + rest_log_sum_1 - log_sum_1
    return Categories(log_p_1, log_q_1, jnp.any(outside_V, axis=-1, keepdims=True))


def log_sum_exp(x_V: jax.Array, keep_V: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """(m, s) with m + s = log(sum(exp(x))) over the kept entries, both [..., 1]; s = -inf for none.

    In two parts because their sum loses digits that a log-softmax needs: it is (x - m) - s.
    """
    kept_V = x_V if keep_V is None else jnp.where(keep_V, x_V, -jnp.inf)
    max_1 = jax.lax.stop_gradient(jnp.max(kept_V, axis=-1, keepdims=True, initial=-jnp.inf))
    none_1 = max_1 == -jnp.inf
    max_1 = jnp.where(none_1, 0.0, max_1)
    sum_1 = jnp.sum(jnp.exp(kept_V - max_1), axis=-1, keepdims=True)
    # Twice where: log(0) would be right in the value and NaN in the gradient.
    return max_1, jnp.where(none_1, -jnp.inf, jnp.log(jnp.where(none_1, 1.0, sum_1)))


def membership(ids_K: jax.Array, valid_K: jax.Array, vocabulary: int) -> jax.Array:
    """bool [..., V]: the tokens that a valid entry names. Others name nothing."""

    def one_row(ids, valid):
        # max and not set: an absent entry must not undo a valid one that has the same id.
        return jnp.zeros((vocabulary,), bool).at[ids].max(valid)

    for _ in range(ids_K.ndim - 1):
        one_row = jax.vmap(one_row)
    return one_row(ids_K, valid_K)


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


def _check_shapes(student_logits: jax.Array, teacher: TopKLogprobs) -> None:
    check_logits(student_logits, "student_logits")
    chex.assert_type(teacher.ids, int, custom_message="teacher.ids must be integers")
    chex.assert_type(teacher.logprobs, float, custom_message="teacher.logprobs must be floating")
    chex.assert_rank(
        [teacher.ids, teacher.logprobs],
        student_logits.ndim,
        custom_message="teacher.ids and teacher.logprobs need the rank of student_logits",
    )
    chex.assert_equal_shape(
        [teacher.ids, teacher.logprobs], custom_message="teacher.ids against teacher.logprobs"
    )
    leading, vocabulary = student_logits.shape[:-1], student_logits.shape[-1]
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
