"""Divergences straight from hidden states: no [tokens, vocabulary] array, in any direction.

A chunk of tokens is projected to the vocabulary, its divergence taken, and its gradient to the
hidden states (and to an unembedding that is trained) made at once, before the next chunk
overwrites it; the backward pass only scales what lies there. That is possible because the weight of
each token is known beforehand. Tokens of weight 0 are not computed.

Equal to `unembed` + the functions of `gkdjax.losses.divergences` in value and gradient, but for
float32 rounding. Shape letters: B rows, N tokens of a row, D and E widths of student and teacher, V
vocabulary, K top-k; C tokens of a chunk.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gkdjax.losses.chunks import Chunks, over_chunks
from gkdjax.losses.divergences import Divergence, total
from gkdjax.losses.lm_head import Head
from gkdjax.losses.masking import masked_sum
from gkdjax.losses.topk import (
    Categories,
    TopKLogprobs,
    check_teacher,
    check_temperature,
    log_sum_exp,
    parts_categories,
    put,
    split,
    top_k_logprobs,
)

# Arrays [tokens, V] that are held at once, counted in what XLA's CPU backend compiles (it does
# nothing in place): `chunk_size` is divided by them, so that it means memory whatever is computed.
_SEARCH_ARRAYS, _TOPK_ARRAYS = 1, 2
_DENSE_ARRAYS = {"forward_kl": 5, "reverse_kl": 5, "mixed": 9, "generalized_jsd": 11}


class _Options(NamedTuple):
    divergence: Divergence
    student: Head
    teacher: Head | None  # of a dense teacher
    tail: str
    chunks: Chunks


def fused_topk_divergence(
    hidden_BND: jax.Array,
    unembedding_VD: jax.Array,
    teacher: TopKLogprobs,
    weights_BN: jax.Array,
    *,
    divergence: str,
    beta: float = 0.0,
    tail: str = "bucket",
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int = 128,
    mesh: Mesh | None = None,
    row_axes: Sequence[str] | None = None,
    vocab_axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """sum over tokens of weight x D(p || q), q = softmax(softcapped(hidden @ unembedding.T) / T).

    D as `topk_forward_kl`, `topk_reverse_kl`, `topk_jsd` ("mixed") or `topk_generalized_jsd` have
    it. With P and Q the masses of the K tokens and L the divergence over the K + 1 categories, the
    gradient to a logit z_v outside K is (dL / d log-sum-exp of the rest) q_v / (1 - Q).

    Args:
      hidden_BND: floating, at the predicting positions; the matrix products are in its dtype.
      unembedding_VD: floating. Where it is not differentiated its gradient is not made.
      teacher: [B,N,K]; no gradient.
      weights_BN: non-negative numbers or bool; no gradient. What weighs 0 costs nothing and may
        hold anything.
      divergence: "forward_kl", "reverse_kl", "mixed" or "generalized_jsd".
      beta: of "mixed" and "generalized_jsd"; a Python number.
      tail: "bucket" or "renormalize".
      temperature: divides the student's logits; positive, static.
      softcap: c in c tanh(logits / c), before the temperature; None: none.
      chunk_size: about as many float32 numbers as [chunk_size, V] has are held at once, and so
        half as many tokens are computed together.
      mesh: devices that share the work. None: no others.
      row_axes: axes of the mesh over which the rows B are cut; each device cuts its own into
        chunks. None: the first axis.
      vocab_axis: the axis over which the unembedding's V is cut: each device has logits of its own
        tokens, and the devices exchange a few numbers a token. None: each has all of it.

    Returns:
      (float32 scalar, differentiable; float32 [B,N] nats a token, unweighted and without gradient,
      0 where the weight is 0).

    Raises:
      ValueError: an unknown divergence or tail; beta, temperature or chunk_size out of range; rows
        or a vocabulary that the mesh cannot share; teacher and hidden states that do not fit.
      AssertionError: ranks or dtypes do not fit.
    """
    _check_student(hidden_BND, unembedding_VD, weights_BN)
    shape = (*hidden_BND.shape[:2], unembedding_VD.shape[0])
    check_teacher(shape, teacher, tail, temperature)
    shared = (mesh, row_axes, vocab_axis)
    options = _options(divergence, beta, temperature, softcap, chunk_size, shared, tail=tail)
    return _run(options, hidden_BND, unembedding_VD, (teacher, None), weights_BN)


def fused_dense_divergence(
    hidden_BND: jax.Array,
    unembedding_VD: jax.Array,
    teacher_hidden_BNE: jax.Array,
    teacher_unembedding_VE: jax.Array,
    weights_BN: jax.Array,
    *,
    divergence: str,
    beta: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_size: int = 128,
    mesh: Mesh | None = None,
    row_axes: Sequence[str] | None = None,
    vocab_axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """sum over tokens of weight x D(p || q) over the whole vocabulary of both.

    D as `forward_kl`, `reverse_kl`, `mixed_kl` or `generalized_jsd` have it, p and q the softmax of
    both sides' softcapped logits / T. With D = sum_v d(p_v, q_v) and u_v = d d / d log q_v, the
    gradient to a logit z_v is u_v - q_v sum u.

    Args:
      teacher_hidden_BNE: floating; no gradient.
      teacher_unembedding_VE: floating, the same V; no gradient.
      teacher_softcap: of the teacher's logits; None: none.
      The others as in `fused_topk_divergence`, but a fifth of `chunk_size` tokens (a ninth for
        "mixed", an eleventh for "generalized_jsd") are computed together: more is held of each.

    Returns:
      As `fused_topk_divergence`.

    Raises:
      As `fused_topk_divergence`; AssertionError too if the two vocabularies differ in size.
    """
    _check_student(hidden_BND, unembedding_VD, weights_BN)
    chex.assert_rank([teacher_hidden_BNE, teacher_unembedding_VE], [3, 2])
    chex.assert_type([teacher_hidden_BNE, teacher_unembedding_VE], float)
    chex.assert_equal_shape_prefix([hidden_BND, teacher_hidden_BNE], 2)
    chex.assert_equal(unembedding_VD.shape[0], teacher_unembedding_VE.shape[0])
    chex.assert_equal(teacher_hidden_BNE.shape[2], teacher_unembedding_VE.shape[1])
    teacher_head = Head(teacher_softcap, temperature)
    shared = (mesh, row_axes, vocab_axis)
    options = _options(
        divergence, beta, temperature, softcap, chunk_size, shared, teacher=teacher_head
    )
    teacher = (teacher_hidden_BNE, teacher_unembedding_VE)
    return _run(options, hidden_BND, unembedding_VD, teacher, weights_BN)


def fused_top_k(
    hidden_BND: jax.Array,
    unembedding_VD: jax.Array,
    k: int,
    mask_BN: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int = 128,
    mesh: Mesh | None = None,
    row_axes: Sequence[str] | None = None,
    vocab_axis: str | None = None,
) -> TopKLogprobs:
    """`top_k_logprobs` of the logits that hidden states and unembedding make, chunk by chunk.

    Args:
      hidden_BND: floating.
      unembedding_VD: floating.
      k: 1 to V.
      mask_BN: bool; what it leaves out costs nothing and comes out absent. None: all count.
      The others as in `fused_topk_divergence`.

    Returns:
      ids, logprobs [B,N,K] and the exact tail [B,N]; see `top_k_logprobs`. No gradient.

    Raises:
      ValueError: k, temperature or chunk_size out of range.
      AssertionError: ranks, shapes or dtypes do not fit.
    """
    mask_BN = jnp.ones(hidden_BND.shape[:2], bool) if mask_BN is None else mask_BN.astype(bool)
    _check_student(hidden_BND, unembedding_VD, mask_BN)
    check_temperature(temperature)
    head = Head(softcap, temperature)
    chunks = Chunks.of_memory(chunk_size, _SEARCH_ARRAYS, mesh, row_axes, vocab_axis)

    def body(nothing, hidden_CD, table_VD):
        logits_CV = head.logits(hidden_CD, table_VD)
        topk = top_k_logprobs(logits_CV, k, vocabulary=chunks.vocabulary)
        return nothing, (topk.ids, topk.logprobs, topk.tail_logprob)

    _, (ids, logprobs, tail) = over_chunks(body, (), hidden_BND, unembedding_VD, mask_BN, chunks)
    logprobs = jnp.where(mask_BN[..., None], logprobs, -jnp.inf)
    return jax.lax.stop_gradient(TopKLogprobs(ids, logprobs, tail, temperature))


def _options(
    divergence, beta, temperature, softcap, chunk_size, shared, *, teacher=None, tail="bucket"
) -> _Options:
    check_temperature(temperature)
    chosen = Divergence(divergence, beta)
    chosen.check()
    arrays = _TOPK_ARRAYS if teacher is None else _DENSE_ARRAYS[divergence]
    head = Head(softcap, temperature)
    chunks = Chunks.of_memory(chunk_size, arrays, *shared)
    return _Options(chosen, head, teacher, tail, chunks)


def _check_student(hidden_BND, unembedding_VD, weights_BN) -> None:
    chex.assert_rank([hidden_BND, unembedding_VD, weights_BN], [3, 2, 2])
    chex.assert_type([hidden_BND, unembedding_VD], float)
    chex.assert_equal(hidden_BND.shape[2], unembedding_VD.shape[1])
    chex.assert_equal_shape_prefix([hidden_BND, weights_BN], 2)


def _run(options, hidden_BND, unembedding_VD, teacher, weights_BN):
    weights_BN = jnp.asarray(weights_BN, jnp.float32)
    summed, each_BN = _weighted_sum(options, hidden_BND, unembedding_VD, teacher, weights_BN)
    return summed, jax.lax.stop_gradient(each_BN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(options: _Options, hidden_BND, table_VD, teacher, weights_BN):
    results, _ = _compute(options, hidden_BND, table_VD, teacher, weights_BN, False, False)
    return results


def _weighted_sum_fwd(options: _Options, *arguments):
    """Which of them are differentiated is known here: that decides what is made."""
    hidden, table = arguments[:2]
    values = jax.tree.map(lambda x: x.value, arguments, is_leaf=lambda x: hasattr(x, "perturbed"))
    return _compute(options, *values, hidden.perturbed, table.perturbed)


def _weighted_sum_bwd(options: _Options, gradients, cotangents):
    slope = cotangents[0]
    d_hidden, d_table = (None if g is None else (g * slope.astype(g.dtype)) for g in gradients)
    return d_hidden, d_table, None, None


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd, symbolic_zeros=True)


def _compute(options: _Options, hidden_BND, table_VD, teacher, weights_BN, to_hidden, to_table):
    """-> ((sum, per token), (gradient to hidden or None, gradient to the unembedding or None))."""
    per_token, teacher_table = teacher
    chunk_values = _topk_chunk if options.teacher is None else _dense_chunk
    table = table_VD.astype(hidden_BND.dtype)  # once, and not for each chunk
    if teacher_table is not None:
        teacher_table = teacher_table.astype(per_token.dtype)

    def body(d_table_VD, chunk, tables):
        hidden_CD, teacher_C, weights_C = chunk
        table_VD, teacher_table = tables
        value_C, d_logits_CV = chunk_values(
            options, hidden_CD, table_VD, teacher_C, teacher_table, weights_C
        )
        outputs = {"value": value_C}
        d_logits_CV = d_logits_CV.astype(hidden_CD.dtype)
        if to_hidden:
            outputs["d_hidden"] = d_logits_CV @ table_VD
        if to_table:
            d_table_VD += jnp.einsum(
                "CV,CD->VD", d_logits_CV, hidden_CD, preferred_element_type=jnp.float32
            )
        return d_table_VD, outputs

    def finish(outputs):  # each device has gone back through its own tokens of the vocabulary
        if to_hidden:
            outputs["d_hidden"] = options.chunks.vocabulary.add(outputs["d_hidden"])
        return outputs

    d_table = jax.ShapeDtypeStruct(table_VD.shape, jnp.float32) if to_table else None
    tokens = (hidden_BND, per_token, weights_BN)
    d_table, outputs = over_chunks(
        body, d_table, tokens, (table, teacher_table), weights_BN > 0, options.chunks, finish
    )
    if to_table:
        d_table = d_table.astype(table_VD.dtype)
    summed = masked_sum(outputs["value"], weights_BN)
    return (summed, outputs["value"]), (outputs["d_hidden"] if to_hidden else None, d_table)


def _topk_chunk(options, hidden_CD, table_VD, teacher, teacher_table, weights_C):
    """-> (divergence [C], d (weight x divergence) / d (hidden @ table) [C,V])."""
    del teacher_table
    head, vocabulary = options.student, options.chunks.vocabulary
    logits_CV = head.logits(hidden_CD, table_VD)
    parts, outside_CV, places_CK = split(logits_CV, teacher, vocabulary)
    size = vocabulary.size(logits_CV.shape[-1])

    def divergence(parts):
        categories = parts_categories(parts, size, teacher, options.tail, head.temperature)
        return total(options.divergence, categories)

    # The rest's maximum and log-sum enter only as their sum: one gradient serves.
    value_C, vjp = jax.vjp(divergence, parts)
    (slopes,) = vjp(weights_C)
    d_inside_CK = slopes.logits_K * head.slope(parts.logits_K)
    d_rest_C1, log_sum_C1 = slopes.rest_log_sum_1, parts.rest_log_sum_1
    share_C1 = jnp.where(log_sum_C1 == -jnp.inf, 0.0, d_rest_C1 * jnp.exp(-log_sum_C1))
    d_CV = jnp.exp(outside_CV - parts.rest_max_1) * share_C1 * head.slope(outside_CV)
    return value_C, put(d_CV, places_CK, d_inside_CK)


def _dense_chunk(options, hidden_CD, table_VD, teacher_CE, teacher_table_VE, weights_C):
    """-> (divergence [C], d (weight x divergence) / d (hidden @ table) [C,V])."""
    vocabulary = options.chunks.vocabulary
    logits_CV = options.student.logits(hidden_CD, table_VD)
    teacher_CV = options.teacher.logits(teacher_CE, teacher_table_VE)
    max_q, log_sum_q = log_sum_exp(logits_CV, vocabulary=vocabulary)
    max_p, log_sum_p = log_sum_exp(teacher_CV, vocabulary=vocabulary)
    log_q_CV = (logits_CV - max_q) - log_sum_q
    log_p_CV = (teacher_CV - max_p) - log_sum_p
    everywhere = jnp.ones(log_p_CV.shape, bool)

    def terms(log_q_CV):
        return options.divergence.terms(Categories(log_p_CV, log_q_CV, everywhere))

    terms_CV, u_CV = jax.jvp(terms, (log_q_CV,), (jnp.ones_like(log_q_CV),))
    value_C, u_C = vocabulary.add((jnp.sum(terms_CV, axis=-1), jnp.sum(u_CV, axis=-1)))
    d_CV = u_CV - jnp.exp(log_q_CV) * u_C[..., None]
    d_CV *= options.student.slope(logits_CV) * weights_C[..., None]
    return value_C, d_CV
