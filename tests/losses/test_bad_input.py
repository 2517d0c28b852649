"""Every bad input raises, and the message names the argument."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax import losses
from tests.losses.loss_cases import DENSE, NAMES, TOPK

STUDENT = jnp.zeros((2, 5))
TOP = losses.top_k_logprobs(jnp.zeros((2, 5)), 3)
ERRORS = (ValueError, AssertionError)


def replaced(**fields):
    return dataclasses.replace(TOP, **fields)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "student, teacher, kwargs, message",
    [
        (STUDENT, TOP, {"tail": "sampled"}, "'bucket', 'renormalize', got 'sampled'"),
        (STUDENT, TOP, {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        (STUDENT, TOP, {"temperature": -1}, "temperature must be positive"),
        (STUDENT, TOP, {"temperature": float("nan")}, "temperature must be positive"),
        (STUDENT, TOP, {"temperature": float("inf")}, "temperature must be positive"),
        (STUDENT, TOP, {"temperature": "1"}, "temperature must be a Python number"),
        (STUDENT, TOP, {"temperature": 2.0}, "temperature=2.0 .*tail='renormalize'"),
        (STUDENT, replaced(temperature=0.0), {}, "teacher.temperature must be positive"),
        (STUDENT.astype(int), TOP, {}, "student_logits must be floating"),
        (jnp.float32(0), TOP, {}, "student_logits needs a last axis"),
        (STUDENT[0], TOP, {}, "need the rank of student_logits"),
        (STUDENT[None], TOP, {}, "need the rank of student_logits"),
        (jnp.zeros((3, 5)), TOP, {}, r"leading axes of student_logits \(3,\) and teacher.ids"),
        (jnp.zeros((2, 2)), TOP, {}, "K=3 tokens, more than the 2 of student_logits"),
        (STUDENT, replaced(ids=TOP.ids.astype(float)), {}, "teacher.ids must be integers"),
        (STUDENT, replaced(logprobs=TOP.ids), {}, "teacher.logprobs must be floating"),
        (STUDENT, replaced(ids=TOP.ids[:, :2]), {}, "teacher.ids against teacher.logprobs"),
        (STUDENT, replaced(tail_logprob=TOP.logprobs), {}, "teacher.tail_logprob, one a token"),
        (STUDENT, replaced(tail_logprob=TOP.ids[:, 0]), {}, "teacher.tail_logprob must be float"),
    ],
)
def test_topk(name, student, teacher, kwargs, message):
    with pytest.raises(ERRORS, match=f"(?s){message}"):
        TOPK[name](student, teacher, **kwargs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "student, teacher, kwargs, message",
    [
        (STUDENT, STUDENT, {"temperature": 0}, "temperature must be positive"),
        (STUDENT.astype(int), STUDENT, {}, "student_logits must be floating"),
        (STUDENT, STUDENT.astype(int), {}, "teacher_logits must be floating"),
        (STUDENT, STUDENT[0], {}, "student_logits against teacher_logits"),
        (STUDENT, STUDENT[:, :4], {}, "student_logits against teacher_logits"),
    ],
)
def test_dense(name, student, teacher, kwargs, message):
    with pytest.raises(ERRORS, match=f"(?s){message}"):
        DENSE[name](student, teacher, **kwargs)


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan"), float("inf")])
def test_beta_out_of_range(beta):
    for fn in (losses.topk_jsd, losses.topk_generalized_jsd):
        with pytest.raises(ValueError, match="beta must be in"):
            fn(STUDENT, TOP, beta)
    for fn in (losses.mixed_kl, losses.generalized_jsd):
        with pytest.raises(ValueError, match="beta must be in"):
            fn(STUDENT, STUDENT, beta)


@pytest.mark.parametrize("beta, kl", [(0.0, "forward_kl"), (1.0, "reverse_kl"), (1, "reverse_kl")])
def test_generalized_ends_name_what_to_use(beta, kl):
    with pytest.raises(ValueError, match=f"beta .*use topk_{kl} instead"):
        losses.topk_generalized_jsd(STUDENT, TOP, beta)
    with pytest.raises(ValueError, match=f"beta .*use {kl} instead"):
        losses.generalized_jsd(STUDENT, STUDENT, beta)


def test_traced_beta_and_temperature_are_refused():
    with pytest.raises(ValueError, match="beta must be a Python number"):
        jax.jit(lambda beta: losses.topk_jsd(STUDENT, TOP, beta))(0.5)
    with pytest.raises(ValueError, match="temperature must be a Python number"):
        jax.jit(lambda t: losses.forward_kl(STUDENT, STUDENT, temperature=t))(1.0)
    losses.topk_jsd(STUDENT, TOP, np.float32(0.5))  # a NumPy number is known, and welcome


@pytest.mark.parametrize("k", [0, 6, -1])
def test_top_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k must be between 1 and the vocabulary's 5, got {k}"):
        losses.top_k_logprobs(STUDENT, k)


def test_top_k_logprobs_of_something_else():
    with pytest.raises(AssertionError, match="logits must be floating"):
        losses.top_k_logprobs(TOP.ids, 1)
    with pytest.raises(ValueError, match="temperature must be positive"):
        losses.top_k_logprobs(STUDENT, 1, temperature=0.0)
