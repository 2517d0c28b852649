"""Masses, rates and divergences between two models, against float64 NumPy."""

import chex
import jax.numpy as jnp
import numpy as np

from gkdjax import losses
from tests.losses import numpy_reference as ref
from tests.losses.loss_cases import TAILS, random_logits

V, K, T = 40, 7, 1.3


def expected(student, teacher, ids, tail):
    """The six measures in float64; `ids` None: dense, with the masses on the K best."""
    log_p, log_q = (ref.log_softmax(np.asarray(x, np.float64) / T) for x in (teacher, student))
    best = np.argsort(-log_p, axis=-1, kind="stable")[..., :K]
    masses = [np.exp(np.take_along_axis(x, best, -1)).sum(-1) for x in (log_p, log_q)]
    masses = [np.ones_like(masses[0])] * 2 if tail == "renormalize" else masses
    top1 = (log_q.argmax(-1) == best[..., 0]).astype(float)
    log_p, log_q = (ref.restrict(x, ids, tail) for x in (log_p, log_q))
    accepted = np.minimum(np.exp(log_p), np.exp(log_q)).sum(-1)
    return [ref.kl(log_p, log_q), ref.kl(log_q, log_p), *masses, top1, accepted]


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_against_float64(self):
        student, teacher = random_logits(3, 4, 5, V, spread=2.0)
        student = student.at[:2].add(teacher[:2])  # some agree
        top = losses.top_k_logprobs(teacher, K, T)
        dense = self.variant(lambda s, t: losses.dense_agreement(s, t, K, temperature=T))
        found = dense(student, teacher)
        self.check(found, expected(student, teacher, None, None))
        assert 0 < found.top1_agreement.mean() < 1
        for tail in TAILS:
            topk = self.variant(
                lambda s, t, tail=tail: losses.topk_agreement(s, t, tail=tail, temperature=T)
            )
            wanted = expected(student, teacher, np.asarray(top.ids), tail)
            self.check(topk(student, top), wanted)

    def check(self, found, wanted):
        for name, got, value in zip(found._fields, found, wanted, strict=True):
            assert got.dtype == jnp.float32 and got.shape == (4, 5)
            np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_model_agrees_with_itself():
    _, teacher = random_logits(5, 3, V, spread=5.0)
    for found in (
        losses.dense_agreement(teacher, teacher, K),
        losses.topk_agreement(teacher, losses.top_k_logprobs(teacher, K)),
    ):
        np.testing.assert_allclose(found.forward_kl, 0.0, atol=1e-6)
        np.testing.assert_allclose(found.acceptance_rate, 1.0, rtol=1e-5)
        np.testing.assert_allclose(found.teacher_top_k_mass, found.student_top_k_mass, rtol=1e-5)
        assert (found.top1_agreement == 1).all()


def test_absent_entries_have_no_mass():
    student, teacher = random_logits(6, 3, V)
    top = losses.top_k_logprobs(teacher, K)
    some = losses.TopKLogprobs(top.ids, top.logprobs.at[:, 3:].set(-jnp.inf))
    mass = losses.topk_agreement(student, some).teacher_top_k_mass
    np.testing.assert_allclose(mass, jnp.exp(top.logprobs[:, :3]).sum(-1), rtol=1e-6)
