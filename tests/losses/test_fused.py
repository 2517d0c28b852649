"""Fused heads: equal to the unfused losses in value and gradient, and what they do not compute."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gkdjax import losses
from gkdjax.losses import TopKLogprobs
from tests.losses import numpy_reference as ref
from tests.losses.loss_cases import DENSE, SHORT, TOPK

BETA = ref.BETA
B, N, V, D, E, K = 4, 6, 300, 8, 12, 7


MESHES = {
    n: Mesh(np.asarray(jax.devices()[:n]), ("data",), axis_types=(AxisType.Auto,)) for n in (3, 4)
}


MOVES = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(")


def arrays(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    draw = {
        "hidden": rng.normal(size=(B, N, D)),
        "table": rng.normal(size=(V, D)),
        "teacher_hidden": rng.normal(size=(B, N, E)),
        "teacher_table": rng.normal(size=(V, E)) / E**0.5,
        "weights": rng.choice([0.0, 0.5, 1.0, 2.0], size=(B, N)),
    }
    return {name: jnp.asarray(value, dtype) for name, value in draw.items()}


def logits(hidden, table, softcap):
    x = jnp.einsum("bnd,vd->bnv", hidden, table)
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def unfused(a, teacher, divergence, temperature, softcap, teacher_softcap=None, tail=None):
    """The same sum through [B,N,V] logits and the library's own unfused losses."""
    student = logits(a["hidden"], a["table"], softcap)
    short = SHORT[divergence]
    if tail is None:
        other = logits(a["teacher_hidden"], a["teacher_table"], teacher_softcap)
        each = DENSE[short](student, other, temperature=temperature)
    else:
        each = TOPK[short](student, teacher, temperature=temperature, tail=tail)
    return losses.masked_sum(each, a["weights"]), jnp.where(a["weights"] > 0, each, 0.0)


def fused(a, teacher, divergence, temperature, softcap, teacher_softcap=None, tail=None, **kwargs):
    common = {"divergence": divergence, "temperature": temperature, "softcap": softcap, **kwargs}
    common["beta"] = BETA if divergence in ("mixed", "generalized_jsd") else 0.0
    if tail is None:
        dense = a["teacher_hidden"], a["teacher_table"]
        return losses.fused_dense_divergence(
            a["hidden"],
            a["table"],
            *dense,
            a["weights"],
            teacher_softcap=teacher_softcap,
            **common,
        )
    return losses.fused_topk_divergence(
        a["hidden"], a["table"], teacher, a["weights"], tail=tail, **common
    )


def with_gradients(fn, a, **kwargs):
    """((sum, per token), gradients to hidden and table)."""

    def value(hidden, table):
        return fn({**a, "hidden": hidden, "table": table}, **kwargs)

    grad = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))
    return grad(a["hidden"], a["table"])


def assert_same(actual, expected, tolerance=2e-5):
    ((value, each), grads), ((expected_value, expected_each), expected_grads) = actual, expected
    np.testing.assert_allclose(value, expected_value, rtol=tolerance)
    np.testing.assert_allclose(each, expected_each, rtol=tolerance, atol=1e-6)
    for got, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


def top_k_of(a, temperature, softcap=None):
    return losses.top_k_logprobs(
        logits(a["teacher_hidden"], a["teacher_table"], softcap), K, temperature
    )


@pytest.mark.parametrize("divergence", SHORT)
@pytest.mark.parametrize(("temperature", "caps"), [(1.0, (None, None)), (1.7, (3.0, 5.0))])
def test_dense_equals_the_unfused_form(divergence, temperature, caps):
    a = arrays()
    options = {"teacher": None, "divergence": divergence, "temperature": temperature}
    options |= {"softcap": caps[0], "teacher_softcap": caps[1]}
    expected = with_gradients(unfused, a, **options)
    assert_same(with_gradients(fused, a, **options, chunk_size=40), expected)


@pytest.mark.parametrize("divergence", SHORT)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (1.7, 3.0)])
def test_topk_equals_the_unfused_form(divergence, tail, temperature, softcap):
    a = arrays()
    options = {"divergence": divergence, "temperature": temperature, "softcap": softcap}
    options |= {"tail": tail, "teacher": top_k_of(a, temperature)}
    expected = with_gradients(unfused, a, **options)
    assert_same(with_gradients(fused, a, **options, chunk_size=10), expected)


@pytest.mark.parametrize("tail", [None, "bucket"])
def test_every_chunk_size_gives_the_same(tail):
    a = arrays()
    options = {"divergence": "forward_kl", "temperature": 1.0, "softcap": None, "tail": tail}
    options["teacher"] = top_k_of(a, 1.0)
    expected = with_gradients(unfused, a, **options)
    for chunk_size in (1, 20, 100_000):  # one token at a time; a rest; all at once
        assert_same(with_gradients(fused, a, **options, chunk_size=chunk_size), expected)


@pytest.mark.parametrize("divergence", SHORT)
def test_entries_that_are_absent_and_a_tail_that_is_not_given(divergence):
    a = arrays()
    top = top_k_of(a, 1.0)
    ids = top.ids.at[..., -2:].set(-5)  # an absent entry's id may be anything
    ids = ids.at[0, 0, -1].set(ids[0, 0, 0])
    teacher = TopKLogprobs(ids, top.logprobs.at[..., -2:].set(-jnp.inf), None)
    options = {"divergence": divergence, "temperature": 1.0, "softcap": None}
    options |= {"tail": "bucket", "teacher": teacher}
    assert_same(with_gradients(fused, a, **options), with_gradients(unfused, a, **options))


@pytest.mark.parametrize("divergence", SHORT)
def test_the_whole_vocabulary_as_top_k_is_the_dense_form(divergence):
    a = arrays()
    a = {**a, "table": a["table"][:9], "teacher_table": a["teacher_table"][:9]}
    teacher = losses.top_k_logprobs(logits(a["teacher_hidden"], a["teacher_table"], None), 9)
    options = {"divergence": divergence, "temperature": 1.0, "softcap": None}
    dense = with_gradients(fused, a, teacher=None, **options)
    assert_same(with_gradients(fused, a, teacher=teacher, tail="bucket", **options), dense)


@pytest.mark.parametrize("divergence", SHORT)
@pytest.mark.parametrize("tail", [None, "bucket", "renormalize"])
def test_float64_numpy_and_finite_differences(divergence, tail):
    a = arrays(1)
    teacher = top_k_of(a, 1.0)
    options = {"divergence": divergence, "temperature": 1.0, "softcap": None, "tail": tail}
    (value, each), (d_hidden, d_table) = with_gradients(fused, a, teacher=teacher, **options)
    exact = {name: np.asarray(x, np.float64) for name, x in a.items()}
    ids = None if tail is None else np.asarray(teacher.ids)

    def numpy_each(hidden, table):
        other = exact["teacher_hidden"] @ exact["teacher_table"].T
        name = SHORT[divergence]
        return ref.divergence(name, hidden @ table.T, other, ids, tail or "bucket")

    def numpy_value(hidden, table):
        return (numpy_each(hidden, table) * exact["weights"]).sum()

    hidden, table = exact["hidden"], exact["table"]
    expected_each = np.where(exact["weights"] > 0, numpy_each(hidden, table), 0.0)
    np.testing.assert_allclose(each, expected_each, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(value, numpy_value(hidden, table), rtol=1e-5)
    rng = np.random.default_rng(2)
    for _ in range(3):  # along random directions: each tests every entry of both gradients
        along = rng.normal(size=hidden.shape), rng.normal(size=table.shape)
        ahead, behind = (
            numpy_value(hidden + s * along[0], table + s * along[1]) for s in (1e-5, -1e-5)
        )
        actual = (np.asarray(d_hidden) * along[0]).sum() + (np.asarray(d_table) * along[1]).sum()
        np.testing.assert_allclose(actual, (ahead - behind) / 2e-5, rtol=1e-4)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_all_ways_to_call_give_one_value(self):
        a = arrays()
        teacher = top_k_of(a, 1.0)
        for tail in (None, "bucket"):
            options = {"divergence": "mixed", "temperature": 1.0, "softcap": None, "tail": tail}
            fn = functools.partial(fused, teacher=teacher, **options)
            value, each = self.variant(fn)(a)
            expected = unfused(a, teacher=teacher, **options)
            np.testing.assert_allclose(value, expected[0], rtol=1e-5)
            np.testing.assert_allclose(each, expected[1], rtol=1e-4, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_all_ways_to_take_the_top_k(self):
        a = arrays()
        found = self.variant(lambda h, t: losses.fused_top_k(h, t, K))(
            a["teacher_hidden"], a["teacher_table"]
        )
        chex.assert_trees_all_close(found, top_k_of(a, 1.0), rtol=1e-5)


@pytest.mark.parametrize("tail", [None, "bucket", "renormalize"])
def test_what_weighs_nothing_may_hold_anything(tail):
    a = arrays()
    teacher = top_k_of(a, 1.0)
    options = {"divergence": "reverse_kl", "temperature": 1.0, "softcap": 3.0, "tail": tail}
    expected = with_gradients(fused, a, teacher=teacher, **options)
    off = a["weights"][..., None] == 0
    assert off.any()
    spoilt = {
        **a,
        "hidden": jnp.where(off, jnp.nan, a["hidden"]),
        "teacher_hidden": jnp.where(off, jnp.inf, a["teacher_hidden"]),
    }
    bad = TopKLogprobs(
        jnp.where(off, -7, teacher.ids),
        jnp.where(off, jnp.nan, teacher.logprobs),
        jnp.where(off[..., 0], jnp.nan, teacher.tail_logprob),
    )
    actual = with_gradients(fused, spoilt, teacher=bad, **options)
    chex.assert_trees_all_equal(actual, expected)
    assert (np.asarray(actual[1][0])[np.asarray(off[..., 0])] == 0).all()


def test_nan_where_a_token_counts_is_seen():
    a = arrays()
    at = tuple(np.argwhere(np.asarray(a["weights"]) > 0)[0])
    a["hidden"] = a["hidden"].at[at].set(jnp.nan)
    options = {"divergence": "forward_kl", "temperature": 1.0, "softcap": None}
    for tail in (None, "bucket"):
        value, _ = fused(a, teacher=top_k_of(a, 1.0), tail=tail, **options)
        assert np.isnan(value)
    teacher = top_k_of(arrays(), 1.0)
    for wrong in (-1, V):  # an id that no vocabulary has
        bad = TopKLogprobs(teacher.ids.at[(*at, 0)].set(wrong), teacher.logprobs, None)
        value, _ = fused(arrays(), teacher=bad, tail="bucket", **options)
        assert np.isnan(value)


@pytest.mark.parametrize("tail", [None, "bucket"])
def test_teacher_weights_and_per_token_values_have_no_gradient(tail):
    a = arrays()
    ids = top_k_of(a, 1.0).ids

    def value(teacher_hidden, teacher_table, weights, logprobs, of_each):
        b = {**a, "teacher_hidden": teacher_hidden, "teacher_table": teacher_table}
        summed, each = fused(
            {**b, "weights": weights},
            TopKLogprobs(ids, logprobs),
            "forward_kl",
            1.0,
            None,
            tail=tail,
        )
        return jnp.sum(each) if of_each else summed

    logprobs = top_k_of(a, 1.0).logprobs
    arguments = a["teacher_hidden"], a["teacher_table"], a["weights"], logprobs
    for of_each in (False, True):
        grads = jax.grad(value, argnums=(0, 1, 2, 3))(*arguments, of_each)
        assert all(not np.any(np.asarray(g)) for g in grads)


def whole_size(fn, *shapes):
    """Temporary bytes of the compiled gradient."""
    return jax.jit(fn).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


N_LARGE, V_LARGE, D_SMALL = 2048, 262_144, 16


def large(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def large_loss(kind, divergence):
    """Loss of (hidden, table, *teacher, weights) at V = 262,144: compiled and never run."""
    beta = BETA if divergence in ("mixed", "generalized_jsd") else 0.0
    if kind == "topk":

        def loss(hidden, table, ids, logprobs, tail, weights):
            teacher = TopKLogprobs(ids, logprobs, tail)
            return losses.fused_topk_divergence(
                hidden, table, teacher, weights, divergence=divergence, beta=beta
            )[0]

        leading = (4, N_LARGE // 4)
        teacher = large(*leading, 64, dtype=jnp.int32), large(*leading, 64), large(*leading)
    else:

        def loss(hidden, table, teacher_hidden, teacher_table, weights):
            student = (hidden, table)
            if kind == "unfused":
                teacher = (teacher_hidden, teacher_table)
                each = losses.forward_kl(logits(*student, None), logits(*teacher, None))
                return losses.masked_sum(each, weights)
            return losses.fused_dense_divergence(
                *student,
                teacher_hidden,
                teacher_table,
                weights,
                divergence=divergence,
                beta=beta,
            )[0]

        leading = (4, N_LARGE // 4)
        teacher = large(*leading, D_SMALL), large(V_LARGE, D_SMALL)
    shapes = (large(*leading, D_SMALL), large(V_LARGE, D_SMALL), *teacher, large(*leading))
    return loss, shapes


def table_sized(loss, shapes, argnums):
    """How many values of the table's shape the differentiated program names."""
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=argnums))(*shapes))
    return text.count(f":f32[{V_LARGE},{D_SMALL}]")


@pytest.mark.parametrize("divergence", SHORT)
@pytest.mark.parametrize("kind", ["topk", "dense"])
def test_no_array_of_tokens_by_vocabulary(kind, divergence):
    dense_bytes = N_LARGE * V_LARGE * 4
    loss, shapes = large_loss(kind, divergence)
    frozen = whole_size(jax.value_and_grad(loss), *shapes)
    assert frozen < dense_bytes / 10
    trained = whole_size(jax.value_and_grad(loss, argnums=(0, 1)), *shapes)
    assert trained < dense_bytes / 10 + V_LARGE * D_SMALL * 4
    assert table_sized(loss, shapes, 0) < table_sized(loss, shapes, (0, 1))


def test_the_unfused_form_fails_the_same_test():
    loss, shapes = large_loss("unfused", "forward_kl")
    assert whole_size(jax.value_and_grad(loss), *shapes) > N_LARGE * V_LARGE * 4


@pytest.mark.parametrize("tail", [None, "bucket"])
def test_four_devices_compute_their_own_rows_and_nothing_of_another(tail):
    a = arrays()
    teacher = top_k_of(a, 1.0)
    options = {"divergence": "mixed", "temperature": 1.0, "softcap": None, "tail": tail}
    expected = with_gradients(fused, a, teacher=teacher, **options)
    mesh = MESHES[4]
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axis)) for axis in (("data",), ()))
    placed = {name: jax.device_put(x, whole if "table" in name else rows) for name, x in a.items()}
    top = jax.device_put(teacher, rows)
    actual = with_gradients(fused, placed, teacher=top, **options, mesh=mesh, chunk_size=8)
    assert_same(actual, expected)

    def value(hidden):
        return fused({**placed, "hidden": hidden}, teacher=top, **options, mesh=mesh)[0]

    text = jax.jit(jax.grad(value)).lower(placed["hidden"]).compile().as_text()
    # Tokens, logits and their gradients stay where they are.
    assert not MOVES.search(text)
    top_k = jax.jit(lambda h, t: losses.fused_top_k(h, t, K, mesh=mesh))
    arguments = placed["teacher_hidden"], placed["teacher_table"]
    chex.assert_trees_all_close(top_k(*arguments), top_k_of(a, 1.0), rtol=1e-5)
    assert not MOVES.search(top_k.lower(*arguments).compile().as_text())


def test_bfloat16_hidden_states_give_float32_losses_and_bfloat16_gradients():
    a = arrays(dtype=jnp.bfloat16)
    options = {"teacher": None, "divergence": "forward_kl", "temperature": 1.0, "softcap": None}
    (value, each), (d_hidden, d_table) = with_gradients(fused, a, **options)
    assert value.dtype == each.dtype == jnp.float32
    assert d_hidden.dtype == d_table.dtype == jnp.bfloat16
    exact = {name: x.astype(jnp.float32) for name, x in a.items()}
    (expected, _), (expected_hidden, _) = with_gradients(fused, exact, **options)
    np.testing.assert_allclose(value, expected, rtol=1e-2)
    scale = np.abs(expected_hidden).max()
    np.testing.assert_allclose(d_hidden / scale, expected_hidden / scale, atol=0.03)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("k", [1, K, V])
def test_fused_top_k_is_top_k_logprobs_where_the_mask_is(softcap, k):
    a = arrays()
    mask = a["weights"] > 0
    table = a["teacher_table"]
    expected = losses.top_k_logprobs(logits(a["teacher_hidden"], table, softcap), k, 1.3)
    spoilt = jnp.where(mask[..., None], a["teacher_hidden"], jnp.nan)
    found = losses.fused_top_k(
        spoilt, table, k, mask, temperature=1.3, softcap=softcap, chunk_size=9
    )
    assert found.temperature == 1.3 and found.ids.dtype == jnp.int32
    kept = np.asarray(mask)
    np.testing.assert_array_equal(np.asarray(found.ids)[kept], np.asarray(expected.ids)[kept])
    np.testing.assert_allclose(found.logprobs[kept], expected.logprobs[kept], rtol=1e-5)
    if k < V:
        np.testing.assert_allclose(
            found.tail_logprob[kept], expected.tail_logprob[kept], rtol=1e-4, atol=1e-6
        )
    assert (np.asarray(found.logprobs)[~kept] == -np.inf).all()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1, got 0"),
        ({"chunk_size": 12.5}, "chunk_size must be a whole number of at least 1, got 12.5"),
        ({"mesh": MESHES[3]}, "4 rows cannot be shared by 3 devices of 'data'"),
        ({"divergence": "kl"}, "divergence must be one of 'forward_kl', .*got 'kl'"),
        ({"divergence": "generalized_jsd", "beta": 0.0}, "use forward_kl instead"),
        ({"divergence": "generalized_jsd", "beta": 1}, "use reverse_kl instead"),
        ({"divergence": "mixed", "beta": 1.5}, r"beta must be in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
@pytest.mark.parametrize("kind", ["topk", "dense"])
def test_bad_options_are_refused(kind, changes, told):
    a = arrays()
    options = {"divergence": "forward_kl", **changes}
    with pytest.raises(ValueError, match=told):
        if kind == "topk":
            teacher = top_k_of(a, 1.0)
            losses.fused_topk_divergence(a["hidden"], a["table"], teacher, a["weights"], **options)
        else:
            dense = a["teacher_hidden"], a["teacher_table"]
            losses.fused_dense_divergence(a["hidden"], a["table"], *dense, a["weights"], **options)


def test_shapes_that_do_not_fit_are_refused():
    a = arrays()
    teacher = top_k_of(a, 1.0)
    student = a["hidden"], a["table"]
    with pytest.raises(AssertionError):
        losses.fused_topk_divergence(
            a["hidden"], a["table"][:, :3], teacher, a["weights"], divergence="forward_kl"
        )
    with pytest.raises(AssertionError):
        losses.fused_topk_divergence(
            *student, teacher, a["weights"][:, :3], divergence="forward_kl"
        )
    with pytest.raises(ValueError, match="leading axes"):
        losses.fused_topk_divergence(
            a["hidden"][:, :3], a["table"], teacher, a["weights"][:, :3], divergence="forward_kl"
        )
    with pytest.raises(ValueError, match="tail must be one of"):
        losses.fused_topk_divergence(
            *student, teacher, a["weights"], divergence="forward_kl", tail="rest"
        )
    with pytest.raises(AssertionError):
        losses.fused_dense_divergence(
            *student,
            a["teacher_hidden"],
            a["teacher_table"][:-1],
            a["weights"],
            divergence="forward_kl",
        )
    with pytest.raises(ValueError, match="k must be between 1 and"):
        losses.fused_top_k(*student, V + 1)
