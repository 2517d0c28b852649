"""The fused heads with the vocabulary cut over devices, against the same on one device."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gkdjax import losses
from gkdjax.losses.divergences import DIVERGENCES

B, N, D, E, V, K = 4, 3, 5, 6, 24, 7  # a part of the vocabulary has 6 tokens, fewer than K
# Two devices share the rows and two the vocabulary, or four the vocabulary.
MESHES = {
    shape: Mesh(
        np.asarray(jax.devices()).reshape(shape), ("rows", "words"), axis_types=(AxisType.Auto,) * 2
    )
    for shape in ((2, 2), (1, 4))
}


def arrays():
    rng = np.random.default_rng(3)
    return {
        "hidden": rng.normal(size=(B, N, D)).astype(np.float32),
        "table": rng.normal(size=(V, D)).astype(np.float32),
        "teacher_hidden": rng.normal(size=(B, N, E)).astype(np.float32),
        "teacher_table": rng.normal(size=(V, E)).astype(np.float32),
        "weights": rng.choice([0.0, 0.5, 2.0], size=(B, N)).astype(np.float32),
    }


def placed(a, mesh):
    def place(name):
        return PartitionSpec("words" if "table" in name else "rows")

    return {name: jax.device_put(x, NamedSharding(mesh, place(name))) for name, x in a.items()}


def on(mesh):
    return {"mesh": mesh, "row_axes": ("rows",), "vocab_axis": "words"} if mesh else {}


def top_k(a, mesh=None, softcap=None):
    return losses.fused_top_k(
        a["teacher_hidden"], a["teacher_table"], K, softcap=softcap, chunk_size=2, **on(mesh)
    )


def with_gradients(a, teacher, mesh=None, **options):
    how = options | on(mesh) | {"chunk_size": 20}

    def value(hidden, table):
        if teacher is None:
            dense = a["teacher_hidden"], a["teacher_table"]
            how.pop("tail")
            return losses.fused_dense_divergence(
                hidden, table, *dense, a["weights"], teacher_softcap=4.0, **how
            )
        return losses.fused_topk_divergence(hidden, table, teacher, a["weights"], **how)

    run = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))
    return run(a["hidden"], a["table"])


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("tail", [None, "bucket", "renormalize"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_losses_and_gradients_are_those_of_one_device(divergence, tail, shape):
    a, mesh = arrays(), MESHES[shape]
    options = {"divergence": divergence, "temperature": 1.0, "softcap": 3.0, "tail": tail}
    options["beta"] = 0.3 if divergence in ("mixed", "generalized_jsd") else 0.0
    teacher = None if tail is None else top_k(a)
    expected = with_gradients(a, teacher, **options)
    found = with_gradients(placed(a, mesh), teacher, mesh, **options)
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shape", MESHES)
def test_the_top_k_of_all_parts_is_that_of_the_whole(shape):
    a = arrays()
    found, expected = top_k(placed(a, MESHES[shape]), MESHES[shape], 2.0), top_k(a, softcap=2.0)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-5)
    np.testing.assert_allclose(found.tail_logprob, expected.tail_logprob, rtol=1e-5)


@pytest.mark.parametrize("shape", MESHES)
def test_the_lowest_id_comes_first_among_equals(shape):
    a = arrays()
    a["teacher_table"] = np.tile(a["teacher_table"][:4], (V // 4, 1))  # each token six times
    found = top_k(placed(a, MESHES[shape]), MESHES[shape])
    np.testing.assert_array_equal(found.ids, top_k(a).ids)
    assert (np.asarray(found.ids)[..., :6] % 4 == np.asarray(found.ids)[..., :1] % 4).all()


def test_absent_ids_write_nothing_and_wrong_ones_give_nan():
    a, mesh = arrays(), MESHES[1, 4]
    options = {"divergence": "forward_kl", "temperature": 1.0, "softcap": None, "tail": "bucket"}
    teacher = top_k(a)
    logprobs = jnp.asarray(teacher.logprobs).at[..., -2:].set(-jnp.inf)
    absent = losses.TopKLogprobs(teacher.ids.at[..., -2:].set(-3), logprobs)
    expected = with_gradients(a, absent, **options)
    found = with_gradients(placed(a, mesh), absent, mesh, **options)
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-6)
    for wrong in (-1, V, V + 3):
        ids = teacher.ids.at[..., 0].set(wrong)
        (value, _), _ = with_gradients(
            placed(a, mesh), losses.TopKLogprobs(ids, teacher.logprobs), mesh, **options
        )
        assert np.isnan(value)


def test_a_vocabulary_that_the_devices_cannot_share_is_refused():
    a, mesh = arrays(), MESHES[1, 4]
    with pytest.raises(ValueError, match="22 tokens of the vocabulary cannot be shared by 4"):
        losses.fused_top_k(a["hidden"], a["table"][:22], 2, **on(mesh))
    with pytest.raises(ValueError, match="between 1 and the vocabulary's 24, got 25"):
        losses.fused_top_k(a["hidden"], a["table"], V + 1, **on(mesh))
