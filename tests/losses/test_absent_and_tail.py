"""Entries that are not there, mass outside the K, and temperatures."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax import losses
from tests.losses import numpy_reference as ref
from tests.losses.loss_cases import (
    NAMES,
    TOPK,
    dense_both,
    random_logits,
    top_k,
    topk_both,
    topk_compiled,
)

INF = float("inf")
EPS = float(jnp.finfo(jnp.float32).eps)


def assert_same(actual, expected, rtol=1e-5, atol=1e-6):
    """Two answers of `topk_both` or `dense_both`."""
    for key, (value, grads) in actual.items():
        np.testing.assert_allclose(value, expected[key][0], rtol, atol, err_msg=key)
        np.testing.assert_allclose(grads, expected[key][1], 10 * rtol, atol, err_msg=key)


def assert_finite(both):
    for key, (value, grads) in both.items():
        assert np.all(np.isfinite(value)), key
        assert np.all(np.isfinite(grads)), key


def with_absent(top, placeholder):
    """`top` and two absent entries, one in front and one behind."""
    ids = jnp.pad(top.ids, ((0, 0), (1, 1)), constant_values=placeholder)
    logprobs = jnp.pad(top.logprobs, ((0, 0), (1, 1)), constant_values=-INF)
    return dataclasses.replace(top, ids=ids, logprobs=logprobs)


@pytest.mark.parametrize("given_tail", [True, False])
def test_absent_entries_count_for_nothing(given_tail):
    student, teacher = random_logits(0, 4, 9, spread=2.0)
    teacher = teacher.at[:2, 0].set(5.0)  # id 0, the usual placeholder, is also a valid one
    top = top_k(teacher, 3)
    if not given_tail:
        top = dataclasses.replace(top, tail_logprob=None)
    expected = topk_both(student, top)
    # A placeholder may be the id of a valid entry, of none, or no id at all.
    for placeholder in (int(top.ids[0, 0]), int(top.ids[1, 2]), 0, 8, -1, 9, 10**6):
        assert_same(topk_both(student, with_absent(top, placeholder)), expected)


@pytest.mark.parametrize("rest", [None, 0.0, -INF])
def test_a_row_of_padding_is_finite(rest):
    student, _ = random_logits(1, 4, 9)
    tail = None if rest is None else jnp.full((4,), rest)
    padding = losses.TopKLogprobs(jnp.zeros((4, 3), int), jnp.full((4, 3), -INF), tail)
    both = topk_both(student, padding)
    assert_finite(both)
    if rest != -INF:
        for value, _ in both.values():
            np.testing.assert_allclose(value, 0.0, atol=1e-6)


def test_teacher_logits_of_minus_infinity():
    student, teacher = random_logits(2, 4, 9)
    teacher = teacher.at[:, 2].set(-INF).at[:, 5].set(-INF)
    dense = dense_both(student, teacher)
    assert_finite(dense)
    for name in ("forward", "generalized"):  # the others are infinite in truth, and floored
        expected = ref.divergence(name, student, teacher)
        np.testing.assert_allclose(dense[name][0], expected, rtol=1e-5)
    both = topk_both(student, top_k(teacher, 9))
    assert_same({name: both[name, "bucket"] for name in NAMES}, dense)


@pytest.mark.parametrize("masked", [-INF, float(jnp.finfo(jnp.float32).min)])
def test_tokens_that_both_sides_mask_change_nothing(masked):
    student, teacher = random_logits(3, 4, 6)

    def pad(x, value):
        return jnp.pad(x, ((0, 0), (0, 3)), constant_values=value)

    student_9, teacher_9 = pad(student, masked), pad(teacher, -INF)
    some, all_9 = (top_k(teacher_9, k) for k in (3, 9))
    ids = np.asarray(some.ids)
    in_part, in_full = topk_both(student_9, some), topk_both(student_9, all_9)
    dense = dense_both(student_9, teacher_9)
    for name in NAMES:
        for both, some_ids in (
            (dense[name], None),
            (in_full[name, "bucket"], None),
            (in_part[name, "bucket"], ids),
        ):
            fn = functools.partial(ref.divergence, name, teacher_logits=teacher, ids=some_ids)
            np.testing.assert_allclose(both[0], fn(student), rtol=1e-5, atol=1e-6, err_msg=name)
            expected = pad(ref.gradient(fn, student), 0.0)
            np.testing.assert_allclose(both[1], expected, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("k", [3, 9])
def test_student_without_mass_where_the_teacher_has_some(k):
    student, teacher = random_logits(10, 4, 9)
    both = topk_both(student.at[:, 5].set(-INF), top_k(teacher, k))
    assert_finite({name: both[name, "bucket"] for name in ("reverse", "generalized")})
    value, grads = both["forward", "bucket"]
    if k == 9:
        assert np.all(value == INF)
    assert np.all(np.isfinite(grads))


def test_derived_tail_agrees_with_the_given_one():
    student, teacher = random_logits(4, 4, 9)
    top = top_k(teacher, 3)
    derived = dataclasses.replace(top, tail_logprob=None)
    assert_same(topk_both(student, derived), topk_both(student, top))


def test_derived_tail_is_floored_where_it_cancels():
    student, _ = random_logits(5, 4, 9)
    # Rounded answers of a server may add up to more than one.
    logprobs = jnp.log(jnp.full((4, 3), 0.33334))
    top = losses.TopKLogprobs(jnp.tile(jnp.arange(3), (4, 1)), logprobs)
    both = topk_both(student, top)
    assert_finite(both)
    assert all(np.all(value >= -1e-6) for value, _ in both.values())
    floored = dataclasses.replace(top, tail_logprob=jnp.full((4,), np.log(EPS)))
    assert_same(both, topk_both(student, floored))
    # A given "nothing" is read as the floor where it is divided by.
    nothing = dataclasses.replace(top, tail_logprob=jnp.full((4,), -INF))
    assert_same(both, topk_both(student, nothing), atol=3e-6)


def test_a_small_given_tail_is_kept_exactly():
    student = jnp.zeros((1, 4))
    top = top_k(jnp.array([[50.0, 50.0, 0.0, 0.0]]), 2)
    np.testing.assert_allclose(top.tail_logprob, -50.0, rtol=1e-6)
    expected = np.log(0.25 / 0.5) / 2 + 0.5 * (np.log(0.5) + 50.0)
    np.testing.assert_allclose(losses.topk_reverse_kl(student, top), expected, rtol=1e-6)


def test_nothing_outside_the_k_means_that_the_tail_is_ignored():
    student, teacher = random_logits(6, 4, 9)
    top = top_k(teacher, 9)
    expected = topk_both(student, top)
    assert_finite(expected)
    for rest in (0.0, -3.0):
        other = dataclasses.replace(top, tail_logprob=jnp.full((4,), rest))
        assert_same(topk_both(student, other), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [9, -1, -9])
def test_an_id_outside_the_vocabulary_is_nan(bad):
    student, teacher = random_logits(7, 4, 9)
    top = top_k(teacher, 3)
    top = dataclasses.replace(top, ids=top.ids.at[:, 1].set(bad))
    for key, (value, _) in topk_both(student, top).items():
        assert np.all(np.isnan(value)), key


@pytest.mark.parametrize("own, new", [(1.0, 3.0), (2.0, 0.7)])
def test_renormalize_takes_the_teacher_to_another_temperature(own, new):
    student, teacher = random_logits(8, 4, 9, spread=4.0)
    top = top_k(teacher, 3, temperature=own)
    values = topk_compiled(student, top, temperature=new, tails=("renormalize",))
    for (name, tail), value in values.items():
        ids = np.asarray(top.ids)
        expected = ref.divergence(name, student, teacher, ids, tail, temperature=new)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_bucket_keeps_to_the_teachers_own_temperature():
    student, teacher = random_logits(9, 4, 9, spread=4.0)
    top = top_k(teacher, 3, temperature=2.0)
    for (name, tail), value in topk_compiled(student, top, temperature=2.0).items():
        expected = ref.divergence(name, student, teacher, np.asarray(top.ids), tail, 2.0)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    for fn in TOPK.values():
        with pytest.raises(ValueError, match=r"temperature=1\.0 .*renormalize"):
            fn(student, top)
