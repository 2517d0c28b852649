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
from tests.losses.loss_cases import DENSE, TAILS, TOPK

MESH = mesh.make_mesh()
BATCH = builders.batch((4, 2, 1, 3))
WEIGHTS_BN = BATCH.target_mask_BN
HIDDEN_BND = np.random.default_rng(1).standard_normal((4, 4, 6)).astype(np.float32)
TABLE_VD = np.random.default_rng(2).standard_normal((32, 6)).astype(np.float32)
CAP = 3.0


def divergence(table_VD, softcap, targets, gkd):
    """The per-token values, of the four devices' rows."""
    return weighted_divergence(
        *(jnp.asarray(HIDDEN_BND), jnp.asarray(table_VD), softcap, targets, WEIGHTS_BN),
        gkd.divergence,
        **gkd.of_loss(),
        **head_axes(MESH),
    )[1]


def top_k_targets(teacher_BNV, k, temperature=1.0, shared=None):
    top_k = top_k_logprobs(teacher_BNV, k, temperature)
    return TopKTargets(top_k, jnp.zeros(top_k.ids.shape[:2]), shared)


def test_every_divergence_is_the_one_of_the_library():
    dense = dataclasses.replace(builders.dense_targets(BATCH), softcap=4.0)

    def compute():
        student_BNV = builders.logits(HIDDEN_BND, TABLE_VD, CAP)
        teacher_BNV = builders.teacher_logits(dense)
        some = top_k_targets(teacher_BNV, 5, 2.0)
        for name in DENSE:
            gkd = Gkd(name, jsd_beta=numpy_reference.BETA, temperature=2.0, chunk_size=7)
            wanted = DENSE[name](student_BNV, teacher_BNV, temperature=2.0)
            yield divergence(TABLE_VD, CAP, dense, gkd), WEIGHTS_BN * wanted
            for tail in TAILS:
                wanted = TOPK[name](student_BNV, some.topk, tail=tail, temperature=2.0)
                of_tail = dataclasses.replace(gkd, tail=tail)
                yield divergence(TABLE_VD, CAP, some, of_tail), WEIGHTS_BN * wanted

    found = jax.jit(lambda: list(compute()))()  # all in one program
    for ours, wanted in found:
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-6)
        assert sum(np.allclose(ours, other, rtol=1e-3) for _, other in found) == 1


@pytest.mark.parametrize("teacher_vocab", [27, 40])
def test_vocabularies_padded_differently_are_compared_on_what_both_have(teacher_vocab):
    targets = builders.dense_targets(BATCH, vocab=teacher_vocab)
    shared = min(teacher_vocab, 32)
    ours = jax.jit(lambda table, targets: divergence(table, None, targets, Gkd("forward_kl")))
    got = ours(TABLE_VD, targets)
    student = builders.logits(HIDDEN_BND, TABLE_VD[:shared], None)
    wanted = losses.forward_kl(student, builders.teacher_logits(targets)[..., :shared])
    np.testing.assert_allclose(got, WEIGHTS_BN * wanted, rtol=1e-4, atol=1e-6)
    beyond, table = np.array(targets.unembedding_VE), np.array(TABLE_VD)
    beyond[shared:], table[shared:] = 50.0, 50.0
    again = ours(table, dataclasses.replace(targets, unembedding_VE=beyond))
    np.testing.assert_array_equal(again, got)


def test_rows_that_only_the_student_has_are_nowhere_whether_dense_or_top_k():
    """K = all ids that both have is the dense case; both are NumPy's in float64."""
    dense = builders.dense_targets(BATCH, vocab=27)
    teacher_BNV = builders.teacher_logits(dense)
    every, few = (top_k_targets(teacher_BNV, k, shared=27) for k in (27, 5))
    table = np.concatenate([TABLE_VD[:27], TABLE_VD[27:] * 9])
    student_BNV = builders.logits(HIDDEN_BND, table[:27], CAP)
    longer = np.concatenate([dense.unembedding_VE, np.full((5, 6), 9.0, np.float32)])
    cut = dataclasses.replace(dense, unembedding_VE=jnp.asarray(longer), shared=27)
    cases = [(dense, None), (cut, None), (every, None), (few, few.topk.ids)]
    gkds = [Gkd(name, jsd_beta=numpy_reference.BETA, chunk_size=7) for name in DENSE]

    @jax.jit  # all in one program
    def ours(table):
        return [[divergence(table, CAP, of, gkd) for of, _ in cases] for gkd in gkds]

    for gkd, found in zip(gkds, ours(table), strict=True):
        for (_, ids), got in zip(cases, found, strict=True):
            wanted = numpy_reference.divergence(gkd.divergence, student_BNV, teacher_BNV, ids)
            np.testing.assert_allclose(got, WEIGHTS_BN * wanted, rtol=1e-5, atol=1e-6)
