"""Every bad input raises, and the message names the argument."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from gkdjax import losses
from gkdjax.losses.chunks import Chunks, over_chunks
from tests.losses.loss_cases import DENSE, TOPK

STUDENT = jnp.zeros((2, 5))
TOP = losses.top_k_logprobs(jnp.zeros((2, 5)), 3)
SHAPES = r"student_logits \(.*\) need ids and logprobs \[..., K\].*teacher.ids \("
forward, reverse, jsd, generalized = TOPK.values()


def top(**fields):
    return dataclasses.replace(TOP, **fields)


def traced(fn):
    return lambda: jax.jit(fn)(0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forward(STUDENT, TOP, tail="sampled"), "'bucket', 'renormalize', got 'sampled'"),
        (lambda: forward(STUDENT, TOP, temperature=0.0), "must be positive and finite, got 0.0"),
        (lambda: reverse(STUDENT, TOP, temperature=-1), "temperature must be positive"),
        (lambda: jsd(STUDENT, TOP, temperature=np.nan), "temperature must be positive"),
        (lambda: generalized(STUDENT, TOP, temperature=np.inf), "temperature must be positive"),
        (lambda: forward(STUDENT, TOP, temperature="1"), "temperature must be a Python number"),
        (lambda: reverse(STUDENT, TOP, temperature=2.0), "temperature=2.0 .*tail='renormalize'"),
        (lambda: jsd(STUDENT, top(temperature=0.0)), "teacher.temperature must be positive"),
        (lambda: generalized(STUDENT.astype(int), TOP), "student_logits must be floating"),
        (lambda: forward(jnp.float32(0), TOP), "student_logits needs a last axis"),
        (lambda: reverse(STUDENT[0], TOP), SHAPES),
        (lambda: jsd(STUDENT[None], TOP), SHAPES),
        (lambda: generalized(jnp.zeros((3, 5)), TOP), SHAPES),
        (lambda: forward(jnp.zeros((2, 2)), TOP), "K at most 2.*"),
        (lambda: reverse(STUDENT, top(ids=TOP.ids[:, :2])), SHAPES),
        (lambda: jsd(STUDENT, top(tail_logprob=TOP.logprobs)), SHAPES),
        (lambda: forward(STUDENT, top(ids=TOP.logprobs)), "teacher.ids must be integers"),
        (lambda: reverse(STUDENT, top(logprobs=TOP.ids)), "teacher.logprobs must be floating"),
        (lambda: jsd(STUDENT, top(tail_logprob=TOP.ids[:, 0])), "tail_logprob must be float"),
        (lambda: DENSE["forward_kl"](STUDENT, STUDENT, temperature=0), "temperature must be pos"),
        (lambda: DENSE["reverse_kl"](STUDENT.astype(int), STUDENT), "student_logits must be float"),
        (lambda: DENSE["mixed"](STUDENT, STUDENT.astype(int)), "teacher_logits must be floating"),
        (lambda: DENSE["generalized_jsd"](STUDENT, STUDENT[0]), "student_logits against teacher"),
        (lambda: DENSE["forward_kl"](STUDENT, STUDENT[:, :4]), "student_logits against teacher"),
        (lambda: losses.topk_jsd(STUDENT, TOP, -0.1), "beta must be in"),
        (lambda: losses.topk_generalized_jsd(STUDENT, TOP, 1.1), "beta must be in"),
        (lambda: losses.mixed_kl(STUDENT, STUDENT, np.nan), "beta must be in"),
        (lambda: losses.generalized_jsd(STUDENT, STUDENT, np.inf), "beta must be in"),
        (lambda: losses.topk_generalized_jsd(STUDENT, TOP, 0.0), "beta .*use forward_kl instead"),
        (lambda: losses.topk_generalized_jsd(STUDENT, TOP, 1), "beta .*use reverse_kl instead"),
        (lambda: losses.generalized_jsd(STUDENT, STUDENT, 1.0), "beta .*use reverse_kl instead"),
        (traced(lambda b: losses.topk_jsd(STUDENT, TOP, b)), "beta must be a Python number"),
        (traced(lambda t: forward(STUDENT, TOP, temperature=t)), "must be a Python number"),
        (lambda: losses.top_k_logprobs(STUDENT, 0), "k must be between 1 and the vocabulary's 5"),
        (lambda: losses.top_k_logprobs(STUDENT, 6), "between 1 and the vocabulary's 5, got 6"),
        (lambda: losses.top_k_logprobs(TOP.ids, 1), "logits must be floating"),
        (lambda: losses.top_k_logprobs(STUDENT, 1, temperature=0.0), "temperature must be posit"),
        (lambda: losses.dense_agreement(STUDENT, STUDENT, 6), "k must be between 1 and"),
        (lambda: losses.dense_agreement(STUDENT, STUDENT[:, 1:], 3), "against teacher_logits"),
        (lambda: losses.topk_agreement(STUDENT, TOP, temperature=2.0), "bucket"),
        (lambda: losses.masked_sum(jnp.ones((2, 3)), jnp.ones(3, bool)), "need one shape"),
        (lambda: losses.masked_mean(jnp.ones((2, 3)), jnp.ones(3, bool)), "need one shape"),
    ],
)
def test_refused(call, message):
    with pytest.raises((ValueError, AssertionError), match=f"(?s){message}"):
        call()


def test_a_numpy_number_is_known_when_tracing():
    losses.topk_jsd(STUDENT, TOP, np.float32(0.5))


HIDDEN, TABLE, WEIGHTS = jnp.zeros((4, 6, 8)), jnp.zeros((24, 8)), jnp.ones((4, 6))
TEACHER = losses.top_k_logprobs(jnp.zeros((4, 6, 24)), 7)
topk = functools.partial(losses.fused_topk_divergence, divergence="forward_kl")
dense = functools.partial(losses.fused_dense_divergence, divergence="forward_kl")


def on(devices, axes=("data",)):
    shape = (1,) * (len(axes) - 1) + (devices,)
    devices = np.asarray(jax.devices()[:devices]).reshape(shape)
    return Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1, got 0"),
        ({"chunk_size": 12.5}, "chunk_size must be a whole number of at least 1, got 12.5"),
        ({"mesh": on(3)}, "4 rows cannot be shared by 3 devices of 'data'"),
        ({"divergence": "kl"}, "divergence must be one of 'forward_kl', .*got 'kl'"),
        ({"divergence": "generalized_jsd", "beta": 1}, "use reverse_kl instead"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_bad_options_of_a_fused_head_are_refused(changes, message):
    for call in (
        lambda: topk(HIDDEN, TABLE, TEACHER, WEIGHTS, **changes),
        lambda: dense(HIDDEN, TABLE, HIDDEN, TABLE, WEIGHTS, **changes),
    ):
        with pytest.raises(ValueError, match=message):
            call()


SHARDED = {"mesh": on(4, ("rows", "words")), "row_axes": ("rows",), "vocab_axis": "words"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topk(HIDDEN, TABLE[:, :3], TEACHER, WEIGHTS), None),
        (lambda: topk(HIDDEN, TABLE, TEACHER, WEIGHTS[:, :3]), None),
        (lambda: topk(HIDDEN[:, :3], TABLE, TEACHER, WEIGHTS[:, :3]), "leading axes"),
        (lambda: topk(HIDDEN, TABLE, TEACHER, WEIGHTS, tail="rest"), "tail must be one of"),
        (lambda: dense(HIDDEN, TABLE, HIDDEN, TABLE[:-1], WEIGHTS), None),
        (lambda: losses.fused_top_k(HIDDEN, TABLE, 25), "k must be between 1 and"),
        (lambda: losses.fused_top_k(HIDDEN, TABLE, 25, **SHARDED), "vocabulary's 24, got 25"),
        (
            lambda: losses.fused_top_k(HIDDEN, TABLE[:22], 2, **SHARDED),
            "22 tokens of the vocabulary cannot be shared by 4",
        ),
        (
            lambda: over_chunks(None, (), WEIGHTS, (), WEIGHTS > 0, Chunks(2, on(3), ("data",))),
            "4 rows cannot be shared by 3 devices of 'data'",
        ),
    ],
)
def test_shapes_that_a_fused_head_cannot_take_are_refused(call, message):
    with pytest.raises((ValueError, AssertionError), match=message):
        call()
