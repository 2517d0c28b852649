"""Values and gradients against float64 NumPy, finite differences, closed forms and each other."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdjax import losses
from tests.losses import numpy_reference as ref
from tests.losses.loss_cases import (
    DENSE,
    TOPK,
    dense_both,
    dense_compiled,
    dense_values,
    random_logits,
    top_k,
    topk_both,
    topk_compiled,
    topk_values,
)


def reference(name, tail, teacher, ids, student, temperature=1.0):
    ids = None if tail == "dense" else ids
    return ref.divergence(name, student, teacher, ids, tail, temperature)


def check_values(values, student, teacher, ids=None, temperature=1.0):
    for (name, tail), value in values.items():
        chex.assert_shape(value, student.shape[:-1])
        chex.assert_type(value, jnp.float32)
        expected = reference(name, tail, teacher, ids, student, temperature)
        np.testing.assert_allclose(value, expected, rtol=5e-6, atol=5e-7, err_msg=(name, tail))


class AgainstFloat64(chex.TestCase):
    SPREADS = np.array([1.0, 5.0, 30.0])[:, None, None]

    @chex.variants(with_jit=True, without_jit=True)
    def test_with_and_without_jit(self):
        student, teacher = random_logits(9, 3, 4, 6, spread=self.SPREADS)
        top = top_k(teacher, 3)
        check_values(self.variant(topk_values)(student, top), student, teacher, top.ids)
        check_values(self.variant(dense_values)(student, teacher), student, teacher)

    @parameterized.parameters((6, 1), (6, 6), (300, 64), (4096, 1), (4096, 20), (4096, 4096))
    def test_topk(self, vocabulary, k):
        student, teacher = random_logits(vocabulary + k, 3, 4, vocabulary, spread=self.SPREADS)
        top = top_k(teacher, k)
        check_values(topk_compiled(student, top), student, teacher, top.ids)

    @parameterized.parameters((6, 2.5), (300, 0.5), (4096, 1.0))
    def test_dense(self, vocabulary, temperature):
        student, teacher = random_logits(vocabulary, 3, 4, vocabulary, spread=self.SPREADS)
        found = dense_compiled(student, teacher, temperature=temperature)
        check_values(found, student, teacher, temperature=temperature)


@pytest.mark.parametrize(("vocabulary", "k"), [(9, 3), (9, 9), (40, 10)])
def test_gradients_are_finite_differences(vocabulary, k):
    spreads = np.array([1.0, 3.0, 10.0, 30.0])[:, None]
    student, teacher = random_logits(vocabulary, 4, vocabulary, spread=spreads)
    top = top_k(teacher, k)
    found = topk_both(student, top) | dense_both(student, teacher)
    for key, (_, actual) in found.items():
        expected = ref.gradient(functools.partial(reference, *key, teacher, top.ids), student)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5, err_msg=key)


def test_the_callers_teacher_is_differentiated_too():
    student, teacher = random_logits(4, 4, 9)
    jacobians = jax.jit(jax.jacrev(lambda y: dense_values(student, y)))(teacher)
    for (name, _), jacobian in jacobians.items():
        expected = ref.gradient(functools.partial(ref.divergence, name, student), teacher)
        np.testing.assert_allclose(jacobian.sum(0), expected, rtol=1e-3, atol=1e-5, err_msg=name)


def test_leading_axes_are_free_and_rows_independent():
    student, teacher = random_logits(0, 3, 4, 6)
    top = top_k(teacher, 6)
    cube = topk_compiled(student, top)
    rows = topk_compiled(*jax.tree.map(lambda x: x.reshape(12, *x.shape[2:]), (student, top)))
    alone = topk_compiled(*jax.tree.map(lambda x: x[1, 2], (student, top)))
    for key, value in cube.items():
        np.testing.assert_allclose(value.reshape(-1), rows[key], rtol=1e-6, err_msg=key)
        assert alone[key].shape == ()
        np.testing.assert_allclose(alone[key], value[1, 2], rtol=1e-6, err_msg=key)


@jax.jit
def _bucket_and_dense(student, teacher):
    tops = [top_k(teacher, k) for k in (1, 20, student.shape[-1])]
    buckets = [topk_values(student, top, tails=("bucket",)) for top in tops]
    return buckets, dense_values(student, teacher)


def check_bound(student, teacher):
    buckets, dense = _bucket_and_dense(student, teacher)
    for values in buckets:
        for (name, _), value in values.items():
            assert np.all(value <= dense[name, "dense"] * (1 + 1e-5) + 1e-6), name
            assert np.all(value >= -1e-6), name


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(1, 30),
    apart=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 3.0]),
)
def test_bucket_is_a_lower_bound_of_dense_and_not_negative(seed, spread, apart):
    teacher, noise = random_logits(seed, 8, 60, spread=spread)
    check_bound(teacher + apart * noise, teacher)


def test_a_large_vocabulary_bound_and_sign_near_zero():
    student, teacher = random_logits(3, 3, 4, 4096)
    check_bound(teacher + 1e-4 * student, teacher)


def test_equal_sides_are_at_zero():
    _, teacher = random_logits(4, 3, 4, 300, spread=4.0)
    found = topk_compiled(teacher, top_k(teacher, 64)) | dense_compiled(teacher, teacher)
    for value in found.values():
        np.testing.assert_allclose(value, 0.0, atol=1e-6)


def test_k_equal_to_the_vocabulary_is_dense():
    student, teacher = random_logits(5, 3, 4, 6, spread=6.0)
    top, dense = top_k(teacher, 6), dense_compiled(student, teacher)
    for teacher in (top, losses.TopKLogprobs(top.ids, top.logprobs)):
        for (name, tail), value in topk_compiled(student, teacher).items():
            np.testing.assert_allclose(value, dense[name, "dense"], rtol=1e-5, err_msg=(name, tail))


def test_the_ends_of_the_mix_are_the_two_kls_to_the_bit():
    student, teacher = random_logits(6, 32, 100, spread=3.0)
    student = student.at[0, 5].set(-jnp.inf)  # the forward KL is infinite, and 0 times it NaN

    def compiled(fn, teacher, **kwargs):
        def both(x):
            value, vjp = jax.vjp(lambda y: fn(y, teacher, **kwargs), x)
            return value, vjp(jnp.ones_like(value))[0]

        return jax.jit(both)(student)

    for beta, name in ((0.0, "forward_kl"), (1, "reverse_kl")):
        mixed = compiled(losses.mixed_kl, teacher, beta=beta)
        chex.assert_trees_all_equal(mixed, compiled(DENSE[name], teacher))
        top, tail = top_k(teacher, 10), {"tail": "renormalize" if beta == 0 else "bucket"}
        mixed = compiled(losses.topk_jsd, top, beta=beta, **tail)
        chex.assert_trees_all_equal(mixed, compiled(TOPK[name], top, **tail))


def test_generalized_jsd_is_bounded_and_symmetric_only_at_one_half():
    student, teacher = random_logits(8, 50, 40, spread=20.0)
    half = losses.generalized_jsd(student, teacher, 0.5)
    assert np.all(half <= np.log(2) * (1 + 1e-5))
    np.testing.assert_allclose(half, losses.generalized_jsd(teacher, student, 0.5), rtol=1e-5)
    low = losses.generalized_jsd(student, teacher, 0.2)
    np.testing.assert_allclose(low, losses.generalized_jsd(teacher, student, 0.8), rtol=1e-4)
    assert not np.allclose(low, losses.generalized_jsd(teacher, student, 0.2), rtol=1e-2)


def test_generalized_jsd_near_its_ends_is_beta_times_the_kl_that_the_error_names():
    student, teacher = random_logits(9, 50, 40)
    near_zero = losses.generalized_jsd(student, teacher, 1e-4) / 1e-4
    np.testing.assert_allclose(near_zero, losses.forward_kl(student, teacher), rtol=0.02)
    near_one = losses.generalized_jsd(student, teacher, 1 - 1e-4) / 1e-4
    np.testing.assert_allclose(near_one, losses.reverse_kl(student, teacher), rtol=0.02)


def test_renormalize_is_blind_outside_the_k_and_bucket_is_not():
    teacher = jnp.log(jnp.array([[0.5, 0.3, 0.1, 0.1]]))
    # 99 % of the student's mass is on tokens that the teacher did not send; the rest has the
    # teacher's proportions.
    student = jnp.log(jnp.array([[0.00625, 0.00375, 0.495, 0.495]]))
    for (name, tail), (value, grads) in topk_both(student, top_k(teacher, 2)).items():
        if tail == "bucket":
            assert value[0] > 0.3 and np.all(grads[:, 2:] > 1e-6), name
        else:
            np.testing.assert_allclose(value, 0.0, atol=1e-6, err_msg=name)
            np.testing.assert_array_equal(grads[:, 2:], 0.0, err_msg=name)


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
    _, actual = topk_both(student, top)["forward_kl", "bucket"]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("k", [3, 9])
def test_confidently_wrong_is_finite(k):
    size = jnp.array([[30.0], [200.0], [1e3], [1e4]])
    teacher = jnp.pad(jnp.concatenate([size, -size], 1), ((0, 0), (0, 7)))
    both = dense_both(-teacher, teacher) | topk_both(-teacher, top_k(teacher, k))
    chex.assert_tree_all_finite(both)
    for tail in ("dense", "bucket"):
        # 2 size nats away, and still pointing home with a full unit of gradient.
        value, grads = both["forward_kl", tail]
        np.testing.assert_allclose(value, 2 * size[:, 0], rtol=1e-6)
        np.testing.assert_allclose(grads[:, :2], [[-1.0, 1.0]] * 4, atol=1e-6)
        np.testing.assert_allclose(grads[:, 2:], 0.0, atol=1e-6)


def test_bfloat16_logits():
    student, teacher = (x.astype(jnp.bfloat16) for x in random_logits(3, 4, 40, spread=5.0))
    top, exact = top_k(teacher, 10), student.astype(jnp.float32)
    full = dense_both(exact, teacher) | topk_both(exact, top)
    for key, (value, grads) in (dense_both(student, teacher) | topk_both(student, top)).items():
        # bfloat16 is read exactly: only the gradient is rounded, at the very end.
        assert value.dtype == jnp.float32 and grads.dtype == jnp.bfloat16
        np.testing.assert_allclose(value, full[key][0], rtol=1e-6, err_msg=key)
        grads = np.asarray(grads, np.float32)
        np.testing.assert_allclose(grads, full[key][1], rtol=1e-2, atol=1e-7, err_msg=key)
