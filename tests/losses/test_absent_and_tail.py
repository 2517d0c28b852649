"""Entries that are absent, mass outside the K, and temperatures."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax import losses
from tests.losses import numpy_reference as ref
from tests.losses.loss_cases import (
    DENSE,
    TOPK,
    dense_both,
    random_logits,
    top_k,
    topk_both,
    topk_compiled,
)

INF = float("inf")
EPS = float(jnp.finfo(jnp.float32).eps)


def with_tail(top, tail):
    tail = None if tail is None else jnp.full(top.ids.shape[:-1], tail)
    return dataclasses.replace(top, tail_logprob=tail)


def assert_same(actual, expected, rtol=1e-5, atol=1e-6):
    """Two answers of `topk_both` or `dense_both`."""
    for key, (value, grads) in actual.items():
        np.testing.assert_allclose(value, expected[key][0], rtol, atol, err_msg=key)
        np.testing.assert_allclose(grads, expected[key][1], 10 * rtol, atol, err_msg=key)


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
    top = top if given_tail else with_tail(top, None)
    expected = topk_both(student, top)
    # A placeholder may be the id of a valid entry, of none, or no id at all.
    for placeholder in (int(top.ids[0, 0]), int(top.ids[1, 2]), 0, 8, -1, 9, 10**6):
        assert_same(topk_both(student, with_absent(top, placeholder)), expected)


@pytest.mark.parametrize("rest", [None, 0.0, -INF])
def test_a_row_of_padding_is_finite(rest):
    student, _ = random_logits(1, 4, 9)
    padding = losses.TopKLogprobs(jnp.zeros((4, 3), int), jnp.full((4, 3), -INF))
    both = topk_both(student, with_tail(padding, rest))
    chex.assert_tree_all_finite(both)
    if rest != -INF:
        for value, _ in both.values():
            np.testing.assert_allclose(value, 0.0, atol=1e-6)


def test_teacher_logits_of_minus_infinity():
    student, teacher = random_logits(2, 4, 9)
    teacher = teacher.at[:, 2].set(-INF).at[:, 5].set(-INF)
    dense = dense_both(student, teacher)
    chex.assert_tree_all_finite(dense)
    for name in ("forward_kl", "generalized_jsd"):  # the others are infinite in truth, and floored
        expected = ref.divergence(name, student, teacher)
        np.testing.assert_allclose(dense[name, "dense"][0], expected, rtol=1e-5)
    both = topk_both(student, top_k(teacher, 9))
    assert_same({(name, "dense"): both[name, "bucket"] for name in DENSE}, dense)


@pytest.mark.parametrize("masked", [-INF, float(jnp.finfo(jnp.float32).min)])
def test_tokens_that_both_sides_mask_change_nothing(masked):
    student, teacher = random_logits(3, 4, 6)

    def pad(x, value):
        return jnp.pad(x, ((0, 0), (0, 3)), constant_values=value)

    student_9, teacher_9 = pad(student, masked), pad(teacher, -INF)
    full, dense = topk_both(student, top_k(teacher, 6)), dense_both(student, teacher)
    some = top_k(teacher, 3)
    for found, expected in (
        (topk_both(student_9, top_k(teacher_9, 9)), full),
        (topk_both(student_9, some), topk_both(student, some)),
        (dense_both(student_9, teacher_9), dense),
    ):
        padded = {key: (value, pad(grads, 0.0)) for key, (value, grads) in expected.items()}
        assert_same(found, padded)


@pytest.mark.parametrize("k", [3, 9])
def test_student_without_mass_where_the_teacher_has_some(k):
    student, teacher = random_logits(10, 4, 9)
    both = topk_both(student.at[:, 5].set(-INF), top_k(teacher, k))
    chex.assert_tree_all_finite([both["reverse_kl", "bucket"], both["generalized_jsd", "bucket"]])
    value, grads = both["forward_kl", "bucket"]
    assert k == 3 or np.all(value == INF)
    assert np.all(np.isfinite(grads))


def test_a_tail_that_is_not_given_is_derived_and_floored_where_it_cancels():
    student, teacher = random_logits(4, 4, 9)
    top = top_k(teacher, 3)
    assert_same(topk_both(student, with_tail(top, None)), topk_both(student, top))
    # Rounded answers of a server may add up to more than one.
    logprobs = jnp.log(jnp.full((4, 3), 0.33334))
    top = losses.TopKLogprobs(jnp.tile(jnp.arange(3), (4, 1)), logprobs)
    both = topk_both(student, top)
    chex.assert_tree_all_finite(both)
    assert all(np.all(value >= -1e-6) for value, _ in both.values())
    assert_same(both, topk_both(student, with_tail(top, np.log(EPS))))
    # A given "nothing" is read as the floor where it is divided by.
    assert_same(both, topk_both(student, with_tail(top, -INF)), atol=3e-6)


def test_a_small_given_tail_is_exact():
    student = jnp.zeros((1, 4))
    top = top_k(jnp.array([[50.0, 50.0, 0.0, 0.0]]), 2)
    np.testing.assert_allclose(top.tail_logprob, -50.0, rtol=1e-6)
    expected = np.log(0.25 / 0.5) / 2 + 0.5 * (np.log(0.5) + 50.0)
    np.testing.assert_allclose(losses.topk_reverse_kl(student, top), expected, rtol=1e-6)


def test_the_students_rest_is_not_a_subtraction():
    # The student has exp(-60) outside the K: "1 - Q" would be 0 in float32, and its log infinite.
    student, teacher = random_logits(6, 4, 9)
    student, teacher = student.at[:, 3:].add(-60.0), teacher.at[:, :3].add(3.0)
    log_p, ids = jax.nn.log_softmax(teacher), jnp.tile(jnp.arange(3), (4, 1))
    rest = jax.nn.logsumexp(log_p[:, 3:], axis=-1)
    value, grads = topk_both(student, losses.TopKLogprobs(ids, log_p[:, :3], rest))[
        "forward_kl", "bucket"
    ]
    np.testing.assert_allclose(value, ref.divergence("forward_kl", student, teacher, ids), 1e-5)
    np.testing.assert_allclose(grads[:, 3:].sum(-1), -np.exp(rest), rtol=1e-5)


def test_nothing_outside_the_k_means_that_the_tail_is_ignored():
    student, teacher = random_logits(6, 4, 9)
    top = top_k(teacher, 9)
    expected = topk_both(student, top)
    chex.assert_tree_all_finite(expected)
    for rest in (0.0, -3.0):
        chex.assert_trees_all_equal(topk_both(student, with_tail(top, rest)), expected)


@pytest.mark.parametrize("bad", [9, -1, -9])
def test_an_id_outside_the_vocabulary_is_nan(bad):
    student, teacher = random_logits(7, 4, 9)
    top = top_k(teacher, 3)
    top = dataclasses.replace(top, ids=top.ids.at[:, 1].set(bad))
    for key, (value, _) in topk_both(student, top).items():
        assert np.all(np.isnan(value)), key


@pytest.mark.parametrize(
    ("own", "new", "tails"),
    [
        (1.0, 3.0, ("renormalize",)),
        (2.0, 0.7, ("renormalize",)),
        (2.0, 2.0, ("bucket", "renormalize")),
    ],
)
def test_renormalize_takes_the_teacher_to_another_temperature_and_bucket_does_not(own, new, tails):
    student, teacher = random_logits(8, 4, 9, spread=4.0)
    top = top_k(teacher, 3, temperature=own)
    for (name, tail), value in topk_compiled(student, top, temperature=new, tails=tails).items():
        expected = ref.divergence(name, student, teacher, top.ids, tail, temperature=new)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    if "bucket" not in tails:
        for fn in TOPK.values():
            with pytest.raises(ValueError, match=rf"temperature={new} .*renormalize"):
                fn(student, top, temperature=new)
