"""Values: against float64 NumPy, against each other, and where the two forms are bounds."""

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
    NAMES,
    dense_compiled,
    dense_values,
    random_logits,
    top_k,
    topk_compiled,
    topk_values,
)

SPREADS = np.array([1.0, 5.0, 30.0])[:, None, None]
SHAPES = ((6, 1), (6, 6), (300, 64), (4096, 1), (4096, 20), (4096, 4096))


class AgainstFloat64(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_topk(self):
        self._check_topk(self.variant(topk_values), 6, 3)

    @parameterized.parameters(*SHAPES)
    def test_topk_shapes(self, vocabulary, k):
        self._check_topk(topk_compiled, vocabulary, k)

    def _check_topk(self, fn, vocabulary, k):
        student, teacher = random_logits(vocabulary + k, 3, 4, vocabulary, spread=SPREADS)
        top = top_k(teacher, k)
        for (name, tail), value in fn(student, top).items():
            chex.assert_shape(value, (3, 4))
            chex.assert_type(value, jnp.float32)
            expected = ref.divergence(name, student, teacher, np.asarray(top.ids), tail)
            np.testing.assert_allclose(value, expected, rtol=5e-6, atol=5e-7, err_msg=(name, tail))

    @chex.variants(with_jit=True, without_jit=True)
    def test_dense(self):
        self._check_dense(self.variant(dense_values), 6, 1.0)

    @parameterized.parameters((6, 2.5), (300, 1.0), (300, 0.5), (4096, 1.0))
    def test_dense_shapes(self, vocabulary, temperature):
        fn = functools.partial(dense_compiled, temperature=temperature)
        self._check_dense(fn, vocabulary, temperature)

    def _check_dense(self, fn, vocabulary, temperature):
        student, teacher = random_logits(vocabulary, 3, 4, vocabulary, spread=SPREADS)
        for name, value in fn(student, teacher).items():
            chex.assert_shape(value, (3, 4))
            chex.assert_type(value, jnp.float32)
            expected = ref.divergence(name, student, teacher, temperature=temperature)
            np.testing.assert_allclose(value, expected, rtol=5e-6, atol=5e-7, err_msg=name)


def test_leading_axes_are_free_and_rows_independent():
    student, teacher = random_logits(0, 3, 4, 6)
    top = top_k(teacher, 6)
    cube = topk_compiled(student, top)
    rows = topk_compiled(*jax.tree.map(lambda x: x.reshape(12, *x.shape[2:]), (student, top)))
    alone = topk_compiled(*jax.tree.map(lambda x: x[1, 2], (student, top)))
    for key, value in cube.items():
        assert value.shape == (3, 4)
        np.testing.assert_allclose(value.reshape(-1), rows[key], rtol=1e-6, err_msg=key)
        assert alone[key].shape == ()
        np.testing.assert_allclose(alone[key], value[1, 2], rtol=1e-6, err_msg=key)


@jax.jit
def _bucket_and_dense(student, teacher):
    tops = [top_k(teacher, k) for k in (1, 20, 60)]
    return [topk_values(student, top, tails=("bucket",)) for top in tops], dense_values(
        student, teacher
    )


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(1, 30),
    apart=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 3.0]),
)
def test_bucket_is_a_lower_bound_of_dense_and_not_negative(seed, spread, apart):
    teacher, noise = random_logits(seed, 8, 60, spread=spread)
    buckets, dense = _bucket_and_dense(teacher + apart * noise, teacher)
    for values in buckets:
        for (name, _), value in values.items():
            assert np.all(value <= dense[name] * (1 + 1e-5) + 1e-6), name
            assert np.all(value >= -1e-6), name


def test_a_large_vocabulary_bound_and_sign_near_zero():
    student, teacher = random_logits(3, 3, 4, 4096)
    student = teacher + 1e-4 * student
    dense = dense_compiled(student, teacher)
    for k in (1, 4096):
        values = topk_compiled(student, top_k(teacher, k), tails=("bucket",))
        for (name, _), value in values.items():
            assert np.all(value <= dense[name] * (1 + 1e-5) + 1e-6), (name, k)
            assert np.all(value >= -1e-6), (name, k)


def test_equal_sides_are_at_zero():
    _, teacher = random_logits(4, 3, 4, 300, spread=4.0)
    for value in topk_compiled(teacher, top_k(teacher, 64)).values():
        np.testing.assert_allclose(value, 0.0, atol=1e-6)
    for value in dense_compiled(teacher, teacher).values():
        np.testing.assert_allclose(value, 0.0, atol=1e-6)


@pytest.mark.parametrize("given_tail", [True, False])
def test_k_equal_to_the_vocabulary_is_dense(given_tail):
    student, teacher = random_logits(5, 3, 4, 6, spread=6.0)
    top = top_k(teacher, 6)
    if not given_tail:
        top = losses.TopKLogprobs(top.ids, top.logprobs)
    dense = dense_compiled(student, teacher)
    for (name, tail), value in topk_compiled(student, top).items():
        np.testing.assert_allclose(value, dense[name], rtol=1e-5, err_msg=(name, tail))


def test_topk_jsd_ends_are_the_two_kls_to_the_bit():
    student, teacher = random_logits(6, 32, 100, spread=3.0)
    top = top_k(teacher, 10)

    def compiled(fn):
        def both(x):
            value, vjp = jax.vjp(lambda y: fn(y, top), x)
            return value, vjp(jnp.ones_like(value))[0]

        return jax.jit(both)(student)

    for tail, beta, kl in (
        ("bucket", 0.0, losses.topk_forward_kl),
        ("bucket", 1.0, losses.topk_reverse_kl),
        ("renormalize", 0.0, losses.topk_forward_kl),
    ):
        mixed = compiled(functools.partial(losses.topk_jsd, beta=beta, tail=tail))
        alone = compiled(functools.partial(kl, tail=tail))
        for a, b in zip(mixed, alone, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{tail} beta={beta}")


def test_dense_ends_are_the_two_kls():
    student, teacher = random_logits(7, 4, 100)
    for beta, kl in ((0, losses.forward_kl), (1, losses.reverse_kl)):
        mixed = losses.mixed_kl(student, teacher, beta)
        np.testing.assert_array_equal(mixed, kl(student, teacher))


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
    top = top_k(teacher, 2)
    values = topk_compiled(student, top)
    for name in NAMES:
        np.testing.assert_allclose(values[name, "renormalize"], 0.0, atol=1e-6, err_msg=name)
        assert values[name, "bucket"][0] > 0.3, name
