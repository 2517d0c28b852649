"""Which divergence of `gkdjax.losses` a config and a teacher's targets get, with what arguments."""

import dataclasses

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax import losses
from gkdjax.config import Gkd
from gkdjax.losses import top_k_logprobs
from gkdjax.losses.objective import TopKTargets, weighted_divergence
from gkdjax.parallel import mesh
from gkdjax.parallel.mesh import head_axes
from tests.losses import numpy_reference
from tests.losses.loss_cases import DENSE, SHORT, TOPK
from tests.losses.numpy_reference import BETA

MESH = mesh.make_mesh()
BATCH = builders.batch((4, 2, 1, 3))
WEIGHTS_BN = BATCH.target_mask_BN
TARGETS = dataclasses.replace(builders.dense_targets(BATCH), softcap=4.0)
HIDDEN_BND = np.random.default_rng(1).standard_normal((4, 4, 6)).astype(np.float32)
TABLE_VD = np.random.default_rng(2).standard_normal((32, 6)).astype(np.float32)
T, CAP = 2.0, 3.0


def divergence(table_VD, softcap, targets, name, gkd):
    """The per-token values, of the four devices' rows."""
    return weighted_divergence(
        *(jnp.asarray(HIDDEN_BND), jnp.asarray(table_VD), softcap, targets, WEIGHTS_BN),
        name,
        **gkd.of_loss(),
        **head_axes(MESH),
    )[1]


@pytest.fixture(scope="module")
def divergences() -> dict:
    """{name: (ours, the library's)} of the four, all in one program."""

    @jax.jit
    def compute():
        found = {}
        student_BNV = builders.logits(HIDDEN_BND, TABLE_VD, CAP)
        teacher_BNV = builders.teacher_logits(TARGETS)
        top_k = top_k_logprobs(teacher_BNV, 5, T)
        some = TopKTargets(top_k, jnp.zeros(top_k.ids.shape[:2]))
        for name, short in SHORT.items():
            gkd = Gkd(name, jsd_beta=BETA, temperature=T, chunk_size=7)
            ours = divergence(TABLE_VD, CAP, TARGETS, name, gkd)
            found[name, "dense"] = ours, DENSE[short](student_BNV, teacher_BNV, temperature=T)
            for tail in ("bucket", "renormalize"):
                ours = divergence(TABLE_VD, CAP, some, name, dataclasses.replace(gkd, tail=tail))
                wanted = TOPK[short](student_BNV, some.topk, tail=tail, temperature=T)
                found[name, tail] = ours, wanted
        masked = {key: (ours, WEIGHTS_BN * wanted) for key, (ours, wanted) in found.items()}
        return masked

    return jax.device_get(compute())


@pytest.mark.parametrize("name", SHORT)
def test_every_divergence_is_the_one_of_the_library(divergences, name):
    for form in ("dense", "bucket", "renormalize"):
        ours, wanted = divergences[name, form]
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-6)
        close = [np.allclose(ours, other, rtol=1e-3) for _, other in divergences.values()]
        assert sum(close) == 1  # no other one would pass


@pytest.mark.parametrize("teacher_vocab", [27, 40])
def test_vocabularies_padded_differently_are_compared_on_what_both_have(teacher_vocab):
    targets = builders.dense_targets(BATCH, vocab=teacher_vocab)
    shared = min(teacher_vocab, 32)

    @jax.jit
    def ours(table_VD, targets):
        return divergence(table_VD, None, targets, "forward_kl", Gkd("forward_kl"))

    got = ours(TABLE_VD, targets)
    student = builders.logits(HIDDEN_BND, TABLE_VD[:shared], None)
    wanted = losses.forward_kl(student, builders.teacher_logits(targets)[..., :shared])
    np.testing.assert_allclose(got, WEIGHTS_BN * wanted, rtol=1e-4, atol=1e-6)
    beyond, table = np.array(targets.unembedding_VE), np.array(TABLE_VD)
    beyond[shared:], table[shared:] = 50.0, 50.0
    again = ours(table, dataclasses.replace(targets, unembedding_VE=beyond))
    np.testing.assert_array_equal(again, got)


@pytest.mark.parametrize("name", SHORT)
def test_rows_that_only_the_student_has_are_nowhere_whether_dense_or_top_k(name):
    """K = all ids that both have is the dense case; both are NumPy's in float64."""
    dense = builders.dense_targets(BATCH, vocab=27)
    teacher_BNV = builders.teacher_logits(dense)
    top_k = top_k_logprobs(teacher_BNV, 27)
    every = TopKTargets(top_k, jnp.zeros(top_k.ids.shape[:2]), shared=27)
    few = TopKTargets(top_k_logprobs(teacher_BNV, 5), every.target_logprob_BN, shared=27)
    gkd = Gkd(name, jsd_beta=BETA, chunk_size=7)
    table = np.concatenate([TABLE_VD[:27], TABLE_VD[27:] * 9])
    student_BNV = builders.logits(HIDDEN_BND, table[:27], CAP)
    for targets, ids in ((dense, None), (every, None), (few, np.asarray(few.topk.ids))):
        got = divergence(table, CAP, targets, name, gkd)
        wanted = numpy_reference.divergence(SHORT[name], student_BNV, teacher_BNV, ids)
        np.testing.assert_allclose(got, WEIGHTS_BN * wanted, rtol=1e-5, atol=1e-6)


def test_within_moves_what_the_student_lacks_to_the_tail():
    logits = np.random.default_rng(3).standard_normal((2, 30)) * 3
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    top_k = top_k_logprobs(jnp.asarray(logits), 12)
    inside = losses.within(top_k, 20)
    kept = np.asarray(top_k.ids) < 20
    assert kept.any() and not kept.all()
    np.testing.assert_array_equal(inside.logprobs != -np.inf, kept)
    left = 1 - np.where(kept, np.take_along_axis(p, np.asarray(top_k.ids), -1), 0).sum(axis=-1)
    np.testing.assert_allclose(np.exp(inside.tail_logprob), left, rtol=1e-5)
    derived = losses.within(dataclasses.replace(top_k, tail_logprob=None), 20)
    assert derived.tail_logprob is None  # it is what the others leave
    assert losses.within(top_k, None) is top_k
