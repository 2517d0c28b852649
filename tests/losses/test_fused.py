"""Fused heads: equal to the unfused losses in value and gradient, and what they do not compute."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gkdjax import losses
from gkdjax.losses import TopKLogprobs
from gkdjax.losses.lm_head import unembed
from tests.losses import numpy_reference as ref
from tests.losses.loss_cases import DENSE, TAILS, TOPK

B, N, V, D, E, K = 4, 6, 304, 8, 12, 7
FORMS = (None, *TAILS)  # None: a dense teacher
PAIRS = list(itertools.product(DENSE, FORMS))


def arrays(seed=0, dtype=np.float32, vocabulary=V):
    rng = np.random.default_rng(seed)
    made = {
        "hidden": rng.normal(size=(B, N, D)),
        "table": rng.normal(size=(vocabulary, D)),
        "teacher_hidden": rng.normal(size=(B, N, E)),
        "teacher_table": rng.normal(size=(vocabulary, E)) / E**0.5,
        "weights": rng.choice([0.0, 0.5, 1.0, 2.0], size=(B, N)),
    }
    return {name: jnp.asarray(value, dtype) for name, value in made.items()}


def teacher_logits(a, softcap=None):
    return unembed(a["teacher_hidden"], a["teacher_table"], softcap)


def top_k_of(a, temperature=1.0, k=K, softcap=None):
    return losses.top_k_logprobs(teacher_logits(a, softcap), k, temperature)


def unfused(a, tail, divergence, teacher=None, temperature=1.0, caps=(None, None)):
    """The same sum through [B,N,V] logits and the library's own unfused losses."""
    student = unembed(a["hidden"], a["table"], caps[0])
    if tail is None:
        other = teacher_logits(a, caps[1])
        each = DENSE[divergence](student, other, temperature=temperature)
    else:
        each = TOPK[divergence](student, teacher, temperature=temperature, tail=tail)
    return losses.masked_sum(each, a["weights"]), jnp.where(a["weights"] > 0, each, 0.0)


def fused(a, tail, divergence, teacher=None, temperature=1.0, caps=(None, None), **options):
    options |= {"divergence": divergence, "temperature": temperature, "softcap": caps[0]}
    options["beta"] = ref.BETA if divergence in ("mixed", "generalized_jsd") else 0.0
    student = a["hidden"], a["table"]
    if tail is None:
        other = a["teacher_hidden"], a["teacher_table"]
        options["teacher_softcap"] = caps[1]
        return losses.fused_dense_divergence(*student, *other, a["weights"], **options)
    return losses.fused_topk_divergence(*student, teacher, a["weights"], tail=tail, **options)


def with_gradients(fn, a, *args, **kwargs):
    """((sum, per token), gradients to hidden and table)."""

    def value(hidden, table):
        return fn({**a, "hidden": hidden, "table": table}, *args, **kwargs)

    grad = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))
    return grad(a["hidden"], a["table"])


same = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
def test_equals_the_unfused_form(divergence, tail):
    # Chunks: one token at a time; many and a rest; all at once.
    for temperature, caps, sizes in (
        (1.0, (None, None), (20,)),
        (1.7, (3.0, 5.0), (1, 40, 100_000) if divergence == "forward_kl" else (40,)),
    ):
        a = arrays()
        options = {"teacher": top_k_of(a, temperature), "temperature": temperature, "caps": caps}
        expected = with_gradients(unfused, a, tail, divergence, **options)
        for size in sizes:
            found = with_gradients(fused, a, tail, divergence, **options, chunk_size=size)
            same(found, expected)


@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
def test_float64_numpy_and_finite_differences(divergence, tail):
    a = arrays(1)
    teacher = top_k_of(a)
    (value, each), grads = with_gradients(fused, a, tail, divergence, teacher)
    exact = {name: np.asarray(x, np.float64) for name, x in a.items()}
    other = exact["teacher_hidden"] @ exact["teacher_table"].T
    ids = None if tail is None else teacher.ids

    def numpy_each(hidden, table):
        found = ref.divergence(divergence, hidden @ table.T, other, ids, tail)
        return np.where(exact["weights"] > 0, found, 0.0)

    def numpy_value(hidden, table):
        return (numpy_each(hidden, table) * exact["weights"]).sum()

    at = exact["hidden"], exact["table"]
    np.testing.assert_allclose(each, numpy_each(*at), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(value, numpy_value(*at), rtol=1e-5)
    rng = np.random.default_rng(2)
    for _ in range(3):  # along random directions: each tests every entry of both gradients
        along = [rng.normal(size=x.shape) for x in at]
        ahead, behind = (
            numpy_value(*(x + step * way for x, way in zip(at, along, strict=True)))
            for step in (1e-5, -1e-5)
        )
        actual = sum((np.asarray(g) * way).sum() for g, way in zip(grads, along, strict=True))
        np.testing.assert_allclose(actual, (ahead - behind) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize("divergence", DENSE)
def test_absent_entries_a_tail_that_is_not_given_and_the_whole_vocabulary(divergence):
    a = arrays(vocabulary=9)
    whole = with_gradients(fused, a, "bucket", divergence, top_k_of(a, k=9))
    same(whole, with_gradients(fused, a, None, divergence))
    top = top_k_of(a)
    ids = top.ids.at[..., -2:].set(-5)  # an absent entry's id may be anything
    ids = ids.at[0, 0, -1].set(ids[0, 0, 0])
    teacher = TopKLogprobs(ids, top.logprobs.at[..., -2:].set(-jnp.inf))
    expected = with_gradients(unfused, a, "bucket", divergence, teacher)
    same(with_gradients(fused, a, "bucket", divergence, teacher), expected)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_all_ways_to_call_give_one_value(self):
        a = arrays()
        teacher = top_k_of(a)
        for tail in (None, "bucket"):
            fn = functools.partial(fused, tail=tail, divergence="mixed", teacher=teacher)
            same(self.variant(fn)(a), unfused(a, tail, "mixed", teacher))
        found = self.variant(lambda h, t: losses.fused_top_k(h, t, K))(
            a["teacher_hidden"], a["teacher_table"]
        )
        same(found, teacher)


@pytest.mark.parametrize("tail", FORMS)
def test_what_weighs_nothing_may_hold_anything(tail):
    a = arrays()
    teacher = top_k_of(a)
    expected = with_gradients(fused, a, tail, "reverse_kl", teacher, caps=(3.0, None))
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
    actual = with_gradients(fused, spoilt, tail, "reverse_kl", bad, caps=(3.0, None))
    chex.assert_trees_all_equal(actual, expected)
    assert (np.asarray(actual[1][0])[np.asarray(off[..., 0])] == 0).all()


def test_nan_where_a_token_counts_is_seen():
    a = arrays()
    teacher = top_k_of(a)
    at = tuple(np.argwhere(np.asarray(a["weights"]) > 0)[0])
    bad = a | {"hidden": a["hidden"].at[at].set(jnp.nan)}
    assert np.isnan(fused(bad, None, "forward_kl")[0])
    assert np.isnan(fused(bad, "bucket", "forward_kl", teacher)[0])
    for wrong in (-1, V):  # an id that no vocabulary has
        wrong = TopKLogprobs(teacher.ids.at[(*at, 0)].set(wrong), teacher.logprobs)
        assert np.isnan(fused(a, "bucket", "forward_kl", wrong)[0])


@pytest.mark.parametrize("tail", [None, "bucket"])
def test_teacher_weights_and_per_token_values_have_no_gradient(tail):
    a = arrays()
    teacher = top_k_of(a)
    names = "teacher_hidden", "teacher_table", "weights"

    def value(others, logprobs, output):
        return jnp.sum(
            fused(a | others, tail, "mixed", TopKLogprobs(teacher.ids, logprobs))[output]
        )

    others = {name: a[name] for name in names}
    for output in (0, 1):
        grads = jax.grad(value, argnums=(0, 1))(others, teacher.logprobs, output)
        assert all(not np.any(np.asarray(g)) for g in jax.tree.leaves(grads))
    each = jax.grad(lambda h: jnp.sum(fused(a | {"hidden": h}, tail, "mixed", teacher)[1]))
    assert not np.any(np.asarray(each(a["hidden"])))


TOKENS, V_LARGE, WIDTH = 2048, 262_144, 16


def large_loss(kind, divergence):
    """(a loss at V = 262,144, shapes of its arguments): compiled and never run."""

    def large(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def loss(hidden, table, teacher, weights):
        a = {"hidden": hidden, "table": table, "weights": weights}
        if kind == "topk":
            return fused(a, "bucket", divergence, TopKLogprobs(*teacher))[0]
        a |= {"teacher_hidden": teacher[0], "teacher_table": teacher[1]}
        return (unfused if kind == "unfused" else fused)(a, None, divergence)[0]

    leading = (4, TOKENS // 4)
    student = large(*leading, WIDTH), large(V_LARGE, WIDTH)
    topk = large(*leading, 64, dtype=jnp.int32), large(*leading, 64), large(*leading)
    return loss, (*student, topk if kind == "topk" else student, large(*leading))


def compiled_bytes(loss, shapes, argnums):
    compiled = jax.jit(jax.value_and_grad(loss, argnums)).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("divergence", DENSE)
@pytest.mark.parametrize("kind", ["topk", "dense"])
def test_no_array_of_tokens_by_vocabulary(kind, divergence):
    loss, shapes = large_loss(kind, divergence)
    tenth, table = TOKENS * V_LARGE * 4 / 10, V_LARGE * WIDTH * 4
    assert compiled_bytes(loss, shapes, 0) < tenth
    assert compiled_bytes(loss, shapes, (0, 1)) < tenth + table
    # A frozen unembedding has no gradient.
    frozen, trained = (str(jax.make_jaxpr(jax.grad(loss, n))(*shapes)) for n in (0, (0, 1)))
    assert frozen.count(f":f32[{V_LARGE},{WIDTH}]") < trained.count(f":f32[{V_LARGE},{WIDTH}]")


def test_the_unfused_form_fails_the_same_test():
    assert compiled_bytes(*large_loss("unfused", "forward_kl"), 0) > TOKENS * V_LARGE * 4


# Four devices share the rows; two the rows and two the vocabulary; four the vocabulary, whose parts
# may be smaller than K.
MOVES = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(")
SHARDINGS = [(4, 1), (2, 2), (1, 4)]


def on(shape):
    """Where a case's arrays lie: (mesh, options of a fused head)."""
    devices = np.asarray(jax.devices()).reshape(shape)
    mesh = Mesh(devices, ("rows", "words"), axis_types=(AxisType.Auto,) * 2)
    shared = {"vocab_axis": "words"} if shape[1] > 1 else {}
    return mesh, {"mesh": mesh, "row_axes": ("rows",), **shared}


def placed(a, mesh):
    def place(name):
        return NamedSharding(mesh, PartitionSpec("words" if "table" in name else "rows"))

    return {name: jax.device_put(x, place(name)) for name, x in a.items()}


@pytest.mark.parametrize(
    ("divergence", "tail", "shape"),
    [(*pair, SHARDINGS[i % 3]) for i, pair in enumerate(PAIRS + PAIRS[1:])],
)
def test_devices_that_share_the_work_give_the_losses_of_one(divergence, tail, shape):
    a, (mesh, options) = arrays(3, vocabulary=24), on(shape)
    teacher = top_k_of(a)
    kwargs = {"teacher": teacher, "caps": (3.0, 4.0), "chunk_size": 20}
    expected = with_gradients(fused, a, tail, divergence, **kwargs)
    found = with_gradients(fused, placed(a, mesh), tail, divergence, **kwargs, **options)
    same(found, expected)


@pytest.mark.parametrize("shape", SHARDINGS)
def test_the_top_k_of_shards_is_that_of_the_whole(shape):
    a, (mesh, options) = arrays(3, vocabulary=24), on(shape)
    search = jax.jit(lambda h, t: losses.fused_top_k(h, t, K, softcap=2.0, chunk_size=2, **options))
    # Each token six times: the lowest id comes first among equals.
    equal = a | {"teacher_table": jnp.tile(a["teacher_table"][:4], (6, 1))}
    for case in (a, equal):
        lies = placed(case, mesh)
        found = search(lies["teacher_hidden"], lies["teacher_table"])
        expected = top_k_of(case, softcap=2.0)
        np.testing.assert_array_equal(found.ids, expected.ids)
        same(found, expected)


def test_devices_that_share_rows_move_no_tokens():
    a, (mesh, options) = arrays(), on((4, 1))
    lies = placed(a, mesh)
    teacher = jax.device_put(top_k_of(a), NamedSharding(mesh, PartitionSpec("rows")))
    for tail in (None, "bucket"):

        def value(hidden, tail=tail):
            return fused(lies | {"hidden": hidden}, tail, "mixed", teacher, **options)[0]

        text = jax.jit(jax.grad(value)).lower(lies["hidden"]).compile().as_text()
        assert not MOVES.search(text)
    search = jax.jit(lambda h, t: losses.fused_top_k(h, t, K, **options))
    student = lies["teacher_hidden"], lies["teacher_table"]
    assert not MOVES.search(search.lower(*student).compile().as_text())


def test_absent_ids_of_a_sharded_vocabulary_write_nothing_and_wrong_ones_give_nan():
    a, (mesh, options) = arrays(vocabulary=24), on((1, 4))
    top, lies = top_k_of(a), placed(a, mesh)
    absent = TopKLogprobs(top.ids.at[..., -2:].set(-3), top.logprobs.at[..., -2:].set(-jnp.inf))
    expected = with_gradients(fused, a, "bucket", "forward_kl", absent)
    same(with_gradients(fused, lies, "bucket", "forward_kl", absent, **options), expected)
    for wrong in (-1, 24, 27):
        bad = TopKLogprobs(top.ids.at[..., 0].set(wrong), top.logprobs)
        assert np.isnan(fused(lies, "bucket", "forward_kl", bad, **options)[0])


def test_bfloat16_hidden_states_give_float32_losses_and_bfloat16_gradients():
    a = arrays(dtype=jnp.bfloat16)
    (value, each), (d_hidden, d_table) = with_gradients(fused, a, None, "forward_kl")
    assert value.dtype == each.dtype == jnp.float32
    assert d_hidden.dtype == d_table.dtype == jnp.bfloat16
    exact = {name: x.astype(jnp.float32) for name, x in a.items()}
    (expected, _), (expected_hidden, _) = with_gradients(fused, exact, None, "forward_kl")
    np.testing.assert_allclose(value, expected, rtol=1e-2)
    scale = np.abs(expected_hidden).max()
    np.testing.assert_allclose(d_hidden / scale, expected_hidden / scale, atol=0.03)


@pytest.mark.parametrize(("k", "softcap"), [(1, 3.0), (K, None), (K, 3.0), (V, None)])
def test_fused_top_k_is_top_k_logprobs_where_the_mask_is(k, softcap):
    a = arrays()
    mask = a["weights"] > 0
    expected = top_k_of(a, 1.3, k, softcap)
    spoilt = jnp.where(mask[..., None], a["teacher_hidden"], jnp.nan)
    options = {"temperature": 1.3, "softcap": softcap, "chunk_size": 9}
    found = losses.fused_top_k(spoilt, a["teacher_table"], k, mask, **options)
    assert found.temperature == 1.3 and found.ids.dtype == jnp.int32
    np.testing.assert_array_equal(found.ids[mask], expected.ids[mask])
    same(found.logprobs[mask], expected.logprobs[mask])
    np.testing.assert_allclose(
        found.tail_logprob[mask], expected.tail_logprob[mask], rtol=1e-4, atol=1e-6
    )
    assert (found.logprobs[~mask] == -np.inf).all()
