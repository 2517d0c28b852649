"""Gradients: against finite differences in float64, closed forms, and where floats run out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax import losses
from tests.losses import numpy_reference as ref
from tests.losses.loss_cases import NAMES, dense_both, dense_values, random_logits, top_k, topk_both

SPREADS = np.array([1.0, 3.0, 10.0, 30.0])[:, None]


@pytest.mark.parametrize("vocabulary, k", [(9, 3), (9, 9), (40, 10)])
def test_topk_matches_finite_differences(vocabulary, k):
    student, teacher = random_logits(vocabulary, 4, vocabulary, spread=SPREADS)
    top = top_k(teacher, k)
    for (name, tail), (_, actual) in topk_both(student, top).items():
        value = functools.partial(
            ref.divergence, name, teacher_logits=teacher, ids=np.asarray(top.ids), tail=tail
        )
        expected = ref.gradient(value, student)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5, err_msg=(name, tail))


def test_dense_matches_finite_differences():
    student, teacher = random_logits(1, 4, 40, spread=SPREADS)
    for name, (_, actual) in dense_both(student, teacher).items():
        value = functools.partial(ref.divergence, name, teacher_logits=teacher)
        expected = ref.gradient(value, student)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_callers_teacher_is_differentiated_too():
    student, teacher = random_logits(4, 4, 9)
    jacobians = jax.jit(jax.jacrev(lambda y: dense_values(student, y)))(teacher)
    for name, jacobian in jacobians.items():
        value = functools.partial(ref.divergence, name, student)
        expected = ref.gradient(value, teacher)
        np.testing.assert_allclose(jacobian.sum(0), expected, rtol=1e-3, atol=1e-5, err_msg=name)


def test_bucket_forward_kl_has_the_closed_form():
    # Outside the K the logit gradient is the student's softmax times one number a token.
    student, teacher = random_logits(2, 4, 40, spread=3.0)
    top = top_k(teacher, 10)
    ids = np.asarray(top.ids)
    q = np.exp(ref.log_softmax(student))
    p_inside = np.take_along_axis(np.exp(ref.log_softmax(teacher)), ids, -1)
    q_inside = np.take_along_axis(q, ids, -1)
    rest_ratio = (1 - p_inside.sum(-1, keepdims=True)) / (1 - q_inside.sum(-1, keepdims=True))
    expected = q * (1 - rest_ratio)
    np.put_along_axis(expected, ids, q_inside - p_inside, -1)
    _, actual = topk_both(student, top)["forward", "bucket"]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-7)


def test_bucket_pulls_mass_back_from_outside_the_k_and_renormalize_cannot():
    student, _ = random_logits(5, 4, 9)
    student = student.at[:, 3:].add(9.0)
    top = top_k(jnp.tile(jnp.arange(9.0, 0.0, -1.0), (4, 1)), 3)
    both = topk_both(student, top)
    for name in NAMES:
        _, pulled = both[name, "bucket"]
        assert np.all(pulled[:, 3:] > 1e-6), name
        _, blind = both[name, "renormalize"]
        np.testing.assert_array_equal(blind[:, 3:], 0.0, err_msg=name)


@pytest.mark.parametrize("k", [3, 9])
def test_confidently_wrong_is_finite(k):
    size = jnp.array([[30.0], [200.0], [1e3], [1e4]])
    teacher = jnp.pad(jnp.concatenate([size, -size], 1), ((0, 0), (0, 7)))
    student = -teacher
    both = dense_both(student, teacher) | topk_both(student, top_k(teacher, k))
    for key, (value, grads) in both.items():
        assert np.all(np.isfinite(value)), key
        assert np.all(np.isfinite(grads)), key
    for key in ("forward", ("forward", "bucket")):
        # 2 size nats away, and still pointing home with a full unit of gradient.
        value, grads = both[key]
        np.testing.assert_allclose(value, 2 * size[:, 0], rtol=1e-6)
        np.testing.assert_allclose(grads[:, :2], [[-1.0, 1.0]] * 4, atol=1e-6)
        np.testing.assert_allclose(grads[:, 2:], 0.0, atol=1e-6)


def test_student_rest_is_not_a_subtraction():
    # The student has exp(-60) outside the K: "1 - Q" would be 0 in float32, and its log infinite.
    student, teacher = random_logits(6, 4, 9)
    student = student.at[:, 3:].add(-60.0)
    teacher = teacher.at[:, :3].add(3.0)
    ids = jnp.tile(jnp.arange(3), (4, 1))
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(teacher), ids, -1)
    rest = jax.nn.logsumexp(jax.nn.log_softmax(teacher)[:, 3:], axis=-1)
    value, grads = topk_both(student, losses.TopKLogprobs(ids, logprobs, rest))["forward", "bucket"]
    expected = ref.divergence("forward", student, teacher, np.asarray(ids))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grads[:, 3:].sum(-1), -np.exp(rest), rtol=1e-5)


def test_bfloat16_logits():
    student, teacher = random_logits(3, 4, 40, spread=5.0)
    student, teacher = student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16)
    top = top_k(teacher, 10)
    exact = student.astype(jnp.float32)
    for half, full in (
        (dense_both(student, teacher), dense_both(exact, teacher)),
        (topk_both(student, top), topk_both(exact, top)),
    ):
        for key, (value, grads) in half.items():
            # bfloat16 is read exactly: only the gradient is rounded, at the very end.
            assert value.dtype == jnp.float32
            np.testing.assert_allclose(value, full[key][0], rtol=1e-6, err_msg=key)
            assert grads.dtype == jnp.bfloat16
            grads = np.asarray(grads, np.float32)
            np.testing.assert_allclose(grads, full[key][1], rtol=1e-2, atol=1e-7, err_msg=key)
