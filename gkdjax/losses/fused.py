"""Divergences straight from hidden states: no [tokens, vocabulary] array, in any direction.

A chunk of tokens is projected to the vocabulary, and its divergence and its gradients to the hidden
states (and to a trained unembedding) are made before the next chunk overwrites it; the backward
pass only scales them. That is possible because the weight of each token is known beforehand. Tokens
of weight 0 are not computed.

Equal to `unembed` and then `gkdjax.losses.divergences`, up to float32 rounding. Letters: B rows, N
tokens of a row, D and E widths of student and teacher, V vocabulary, K top-k, C tokens of a chunk.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from gkdjax.losses.chunks import Chunks, over_chunks
from gkdjax.losses.divergences import DIVERGENCES, Divergence, total
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

# Arrays [tokens, V] that are held at once, as XLA's CPU backend compiles it: `chunk_size` is
# divided by them, and so means memory.
_SEARCH_ARRAYS, _TOPK_ARRAYS = 1, 2


class _Options(NamedTuple):
    divergence: Divergence
    chunks: Chunks
    student: Head
    teacher: Head | None = None  # of a dense teacher
    tail: str = "bucket"


def fused_topk_divergence(
    hidden_BND: Array,
    unembedding_VD: Array,
    teacher: TopKLogprobs,
    weights_BN: Array,
    *,
    divergence: str,
    beta: float = 0.0,
    tail: str = "bucket",
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int = 128,
    **axes,
) -> tuple[Array, Array]:
    """sum over tokens of weight x D(p || q), q = softmax(softcapped(hidden @ unembedding.T) / T).

    D is `topk_forward_kl`, `topk_reverse_kl`, `topk_jsd` ("mixed") or `topk_generalized_jsd`. With
    Q the student's mass on the K tokens and L the divergence over the K + 1 categories, the
    gradient to a logit z_v outside K is (dL / d log-sum-exp of the rest) q_v / (1 - Q).

    Args:
      hidden_BND: floating, at the predicting positions; the matrix products are in its dtype.
      unembedding_VD: floating. Its gradient is only made if it is differentiated.
      teacher: [B,N,K]; no gradient.
      weights_BN: non-negative numbers or bool; no gradient. A token of weight 0 costs nothing, and
        its values may be anything.
      divergence: "forward_kl", "reverse_kl", "mixed" or "generalized_jsd".
      beta: of "mixed" and "generalized_jsd"; a Python number.
      tail: "bucket" or "renormalize".
      temperature: T, divides the student's logits; a positive Python number.
      softcap: c in c tanh(logits / c), before the temperature; None: none.
      chunk_size: memory: about one float32 array [chunk_size, V]. Half as many tokens are computed
        together.
      **axes: mesh, row_axes and vocab_axis, the devices that share the work; see
        `gkdjax.losses.chunks.Chunks.of_memory`.

    Returns:
      (float32 scalar, differentiable; float32 [B,N] nats a token, unweighted and without gradient,
      0 where the weight is 0).

    Raises:
      ValueError: an unknown divergence or tail; beta, temperature or chunk_size out of range; rows
        or a vocabulary that the mesh cannot share; teacher and hidden states that do not fit.
      AssertionError: ranks or dtypes do not fit.
    """
    check_teacher((*hidden_BND.shape[:2], len(unembedding_VD)), teacher, tail, temperature)
    chunks = Chunks.of_memory(chunk_size, _TOPK_ARRAYS, **axes)
    student = Head(softcap, temperature)
    options = _Options(Divergence(divergence, beta), chunks, student, tail=tail)
    return _run(options, hidden_BND, unembedding_VD, (teacher, None), weights_BN)


def fused_dense_divergence(
    hidden_BND: Array,
    unembedding_VD: Array,
    teacher_hidden_BNE: Array,
    teacher_unembedding_VE: Array,
    weights_BN: Array,
    *,
    divergence: str,
    beta: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_size: int = 128,
    **axes,
) -> tuple[Array, Array]:
    """sum over tokens of weight x D(p || q) over the whole vocabulary of both.

    D is `forward_kl`, `reverse_kl`, `mixed_kl` or `generalized_jsd`; p and q are the softmax of
    both sides' softcapped logits / T. With D = sum_v d(p_v, q_v) and u_v = d d / d log q_v, the
    gradient to a logit z_v is u_v - q_v sum u.

    The arguments, results and errors are those of `fused_topk_divergence`. The teacher's hidden
    states and unembedding (the same V) have no gradient. A fifth of `chunk_size` tokens are
    computed together, a ninth for "mixed" and an eleventh for "generalized_jsd".
    """
    chex.assert_rank([teacher_hidden_BNE, teacher_unembedding_VE], [3, 2])
    chex.assert_type([teacher_hidden_BNE, teacher_unembedding_VE], float)
    chex.assert_equal_shape_prefix([hidden_BND, teacher_hidden_BNE], 2)
    chex.assert_equal(unembedding_VD.shape[0], teacher_unembedding_VE.shape[0])
    chex.assert_equal(teacher_hidden_BNE.shape[2], teacher_unembedding_VE.shape[1])
    check_temperature(temperature)
    chosen = Divergence(divergence, beta)
    chunks = Chunks.of_memory(chunk_size, DIVERGENCES[divergence].dense_arrays, **axes)
    heads = Head(softcap, temperature), Head(teacher_softcap, temperature)
    teacher = teacher_hidden_BNE, teacher_unembedding_VE
    options = _Options(chosen, chunks, *heads)
    return _run(options, hidden_BND, unembedding_VD, teacher, weights_BN)


def fused_top_k(
    hidden_BND: Array,
    unembedding_VD: Array,
    k: int,
    mask_BN: Array | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int = 128,
    **axes,
) -> TopKLogprobs:
    """`top_k_logprobs` of the logits of hidden states and unembedding, chunk by chunk.

    Tokens outside `mask_BN` (bool; None: all count) cost nothing and come out absent. k is 1 to V;
    the other arguments are those of `fused_topk_divergence`.

    Returns:
      ids and logprobs [B,N,K] and the exact tail [B,N], without gradient.

    Raises:
      ValueError: k, temperature or chunk_size out of range.
      AssertionError: ranks, shapes or dtypes do not fit.
    """
    mask_BN = jnp.ones(hidden_BND.shape[:2], bool) if mask_BN is None else mask_BN.astype(bool)
    _check_student(hidden_BND, unembedding_VD, mask_BN)
    check_temperature(temperature)
    head = Head(softcap, temperature)
    chunks = Chunks.of_memory(chunk_size, _SEARCH_ARRAYS, **axes)

    def body(nothing, hidden_CD, table_VD):
        logits_CV = head.logits(hidden_CD, table_VD)
        topk = top_k_logprobs(logits_CV, k, vocabulary=chunks.vocabulary)
        return nothing, (topk.ids, topk.logprobs, topk.tail_logprob)

    _, (ids, logprobs, tail) = over_chunks(body, (), hidden_BND, unembedding_VD, mask_BN, chunks)
    logprobs = jnp.where(mask_BN[..., None], logprobs, -jnp.inf)
    return jax.lax.stop_gradient(TopKLogprobs(ids, logprobs, tail, temperature))


def _check_student(hidden_BND, unembedding_VD, weights_BN) -> None:
    chex.assert_rank([hidden_BND, unembedding_VD, weights_BN], [3, 2, 2])
    chex.assert_type([hidden_BND, unembedding_VD], float)
    chex.assert_equal(hidden_BND.shape[2], unembedding_VD.shape[1])
    chex.assert_equal_shape_prefix([hidden_BND, weights_BN], 2)


def _run(options: _Options, hidden_BND, unembedding_VD, teacher, weights_BN):
    _check_student(hidden_BND, unembedding_VD, weights_BN)
    weights_BN = jnp.asarray(weights_BN, jnp.float32)
    summed, each_BN = _weighted_sum(options, hidden_BND, unembedding_VD, teacher, weights_BN)
    return summed, jax.lax.stop_gradient(each_BN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(options: _Options, hidden_BND, table_VD, teacher, weights_BN):
    return _compute(options, hidden_BND, table_VD, teacher, weights_BN, False, False)[0]


def _weighted_sum_fwd(options: _Options, *arguments):
    """Makes the gradients that are asked for."""
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
        hidden_CD, *_, weights_C = chunk
        value_C, d_logits_CV = chunk_values(options, *chunk[:2], *tables, weights_C)
        d_logits_CV = d_logits_CV.astype(hidden_CD.dtype)
        d_hidden_CD = d_logits_CV @ tables[0] if to_hidden else None
        if to_table:
            d_table_VD += jnp.einsum(
                "CV,CD->VD", d_logits_CV, hidden_CD, preferred_element_type=jnp.float32
            )
        return d_table_VD, (value_C, d_hidden_CD)

    def finish(outputs):  # adds what each shard of the vocabulary gives to the hidden states
        value, d_hidden = outputs
        return value, jax.tree.map(options.chunks.vocabulary.add, d_hidden)

    d_table = jax.ShapeDtypeStruct(table_VD.shape, jnp.float32) if to_table else None
    tokens = (hidden_BND, per_token, weights_BN)
    d_table, (each_BN, d_hidden) = over_chunks(
        body, d_table, tokens, (table, teacher_table), weights_BN > 0, options.chunks, finish
    )
    if to_table:
        d_table = d_table.astype(table_VD.dtype)
    return (masked_sum(each_BN, weights_BN), each_BN), (d_hidden, d_table)


def _topk_chunk(options, hidden_CD, teacher, table_VD, _, weights_C):
    """-> (divergence [C], d (weight x divergence) / d (hidden @ table) [C,V])."""
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


def _dense_chunk(options, hidden_CD, teacher_CE, table_VD, teacher_table_VE, weights_C):
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
