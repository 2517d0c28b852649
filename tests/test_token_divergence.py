"""Which divergence of `gkdjax.losses` a config and a teacher's targets get, with what arguments."""

import dataclasses
import functools

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax import losses
from gkdjax.config import Gkd
from gkdjax.losses import top_k_logprobs
from gkdjax.train_step import teacher_logits, token_divergence
from gkdjax.types import TopKTargets

BATCH = builders.batch((4, 2))
TARGETS = builders.dense_targets(BATCH)
LOGITS_BNV = np.random.default_rng(1).standard_normal((2, 4, 32)).astype(np.float32)
BETA, T = 0.3, 2.0
DENSE = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "mixed": functools.partial(losses.mixed_kl, beta=BETA),
    "generalized_jsd": functools.partial(losses.generalized_jsd, beta=BETA),
}
TOP_K = {
    "forward_kl": losses.topk_forward_kl,
    "reverse_kl": losses.topk_reverse_kl,
    "mixed": functools.partial(losses.topk_jsd, beta=BETA),
    "generalized_jsd": functools.partial(losses.topk_generalized_jsd, beta=BETA),
}


@pytest.fixture(scope="module")
def divergences() -> dict:
    """{name: (ours, the library's)} of the four, all in one program."""

    @jax.jit
    def compute(logits_BNV):
        found = {}
        top_k = top_k_logprobs(teacher_logits(TARGETS), 5, T)
        some = TopKTargets(top_k, jnp.zeros(top_k.ids.shape[:2]))
        for name in DENSE:
            gkd = Gkd(name, jsd_beta=BETA, temperature=T)
            dense = DENSE[name](logits_BNV, teacher_logits(TARGETS), temperature=T)
            found[name, "dense"] = token_divergence(logits_BNV, TARGETS, name, gkd), dense
            for tail in ("bucket", "renormalize"):
                ours = token_divergence(logits_BNV, some, name, dataclasses.replace(gkd, tail=tail))
                wanted = TOP_K[name](logits_BNV, some.topk, tail=tail, temperature=T)
                found[name, tail] = ours, wanted
        return found

    return jax.device_get(compute(LOGITS_BNV))


@pytest.mark.parametrize("name", DENSE)
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
    def both(logits_BNV, targets):
        teacher = teacher_logits(targets)[..., :shared]
        wanted = losses.forward_kl(logits_BNV[..., :shared], teacher)
        return token_divergence(logits_BNV, targets, "forward_kl", Gkd("forward_kl")), wanted

    got, wanted = both(LOGITS_BNV, targets)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    beyond = np.array(targets.unembedding_VE)
    beyond[shared:] = 50.0
    logits = np.array(LOGITS_BNV)
    logits[..., shared:] = 50.0
    again, _ = both(logits, dataclasses.replace(targets, unembedding_VE=beyond))
    np.testing.assert_array_equal(again, got)
