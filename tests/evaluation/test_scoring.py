"""Means over tokens, against float64 NumPy with all logits at once."""

import dataclasses

import builders
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax import losses
from gkdjax.config import Gkd
from gkdjax.evaluation import scoring
from gkdjax.evaluation.scoring import EvalModel, ScoredText
from gkdjax.losses import top_k_logprobs
from gkdjax.losses.objective import TopKTargets
from gkdjax.parallel import mesh
from tests.losses.numpy_reference import kl, log_softmax

MESH = mesh.make_mesh()
BATCH = builders.batch((4, 2, 1, 3))
MASK = np.asarray(BATCH.target_mask_BN)


@pytest.fixture(scope="module")
def reader() -> EvalModel:
    decoder, params = builders.small_model()
    return EvalModel.of(decoder, params, None, prefix_bytes=0)


@pytest.fixture(scope="module")
def log_q(reader) -> dict:
    """View -> the student's log-probabilities [B,N,V] in float64."""
    found = {}
    for view in ("student", "teacher"):
        hidden = scoring.predicting(reader, BATCH, view, MESH)
        table = reader.params["embedding"]
        found[view] = log_softmax(builders.logits(hidden, table, reader.decoder.spec.final_softcap))
    return found


TARGETS = builders.dense_targets(BATCH)
LOG_P = log_softmax(builders.teacher_logits(TARGETS))


def mean(values_BN) -> float:
    return values_BN[MASK].mean()


@pytest.mark.parametrize("view", ["student", "teacher"])
def test_dense_means_are_those_of_the_whole_vocabulary(reader, log_q, view):
    scored = ScoredText([(BATCH, TARGETS)], rows=4)
    found = scoring.mean_agreement(reader, scored, view, Gkd(chunk_size=7), MESH)
    q = log_q[view]
    own = np.take_along_axis(q, BATCH.target_ids_BN[..., None], -1)[..., 0]
    expected = {
        "forward_kl": mean(kl(LOG_P, q)),
        "reverse_kl": mean(kl(q, LOG_P)),
        "top1_agreement": mean((LOG_P.argmax(-1) == q.argmax(-1)).astype(float)),
        "acceptance_rate": mean(np.minimum(np.exp(LOG_P), np.exp(q)).sum(-1)),
        "perplexity": np.exp(-mean(own)),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-5), name
    assert set(found) == {*losses.Agreement._fields, "perplexity"}


@pytest.mark.parametrize("k", [None, 5, 27])
@pytest.mark.parametrize("teacher_rows", [27, 40])
def test_only_ids_of_both_models_are_compared(reader, teacher_rows, k):
    """The student has 32 rows and the two 27 ids in common; ids that only the teacher has are tail.

    A dense teacher is renormalised over what both have, as its training has it.
    """
    batch = builders.batch((4, 2, 1, 3), vocab=27)
    dense = builders.dense_targets(batch, vocab=teacher_rows)
    logits_BNV = builders.teacher_logits(dense)
    hidden = scoring.predicting(reader, batch, "student", MESH)
    table = reader.params["embedding"][:27]
    log_q = log_softmax(builders.logits(hidden, table, reader.decoder.spec.final_softcap))
    own = np.take_along_axis(log_q, batch.target_ids_BN[..., None], -1)[..., 0]
    if k is None:
        targets = dataclasses.replace(dense, shared=27)
        log_p = log_softmax(logits_BNV[..., :27])
        best, masses = log_p.argmax(-1), [np.ones(MASK.shape)] * 2
        p, q = np.exp(log_p), np.exp(log_q)
    else:
        top_k = top_k_logprobs(logits_BNV, k)
        targets = TopKTargets(top_k, jnp.zeros(MASK.shape), shared=27)
        ids = np.asarray(top_k.ids)
        best, inside = ids[..., 0], ids < 27
        assert inside.all() == (teacher_rows == 27)
        p = np.take_along_axis(np.exp(log_softmax(logits_BNV)), ids, -1) * inside
        q = np.take_along_axis(np.exp(log_q), np.minimum(ids, 26), -1) * inside
        masses = [p.sum(-1), q.sum(-1)]
        p, q = (np.append(x, np.maximum(1 - x.sum(-1, keepdims=True), 0), -1) for x in (p, q))
        if k == teacher_rows:  # nothing is left of either
            p[..., -1] = q[..., -1] = 0
    with np.errstate(divide="ignore"):
        log_of_p, log_of_q = np.log(p), np.log(q)
    expected = {
        "forward_kl": mean(kl(log_of_p, log_of_q)),
        "reverse_kl": mean(kl(log_of_q, log_of_p)),
        "teacher_top_k_mass": mean(masses[0]),
        "student_top_k_mass": mean(masses[1]),
        "top1_agreement": mean((best == log_q.argmax(-1)).astype(float)),
        "acceptance_rate": mean(np.minimum(p, q).sum(-1)),
        "perplexity": np.exp(-mean(own)),
    }
    found = scoring.mean_agreement(
        reader, ScoredText([(batch, targets)], 4), "student", Gkd(chunk_size=7), MESH
    )
    assert found == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_perplexity_is_the_students_own_whatever_the_teacher_and_its_temperature(
    reader, log_q, temperature
):
    top_k = top_k_logprobs(builders.teacher_logits(TARGETS), 5, temperature)
    some = TopKTargets(top_k, jnp.zeros(top_k.ids.shape[:2]))
    gkd = Gkd(chunk_size=7, temperature=temperature, tail="renormalize")
    found = scoring.mean_agreement(reader, ScoredText([(BATCH, some)], 4), "student", gkd, MESH)
    own = np.take_along_axis(log_q["student"], BATCH.target_ids_BN[..., None], -1)[..., 0]
    assert found["perplexity"] == pytest.approx(np.exp(-mean(own)), rel=2e-5)


def test_rows_that_fill_a_batch_count_for_nothing(reader):
    gkd = Gkd(chunk_size=7)
    whole = ScoredText([(BATCH, TARGETS)] * 2, rows=4)
    first = whole.first(5)
    assert [int(b.target_mask_BN.any(1).sum()) for b, _ in first.batches] == [4, 1]
    found = scoring.mean_agreement(reader, first, "student", gkd, MESH)
    one = dataclasses.replace(BATCH, target_mask_BN=MASK & (np.arange(4)[:, None] < 1))
    by_hand = [
        scoring.mean_agreement(reader, ScoredText([(b, TARGETS)], 4), "student", gkd, MESH)
        for b in (BATCH, one)
    ]
    weights = np.asarray([MASK.sum(), MASK[0].sum()])
    for name in ("forward_kl", "acceptance_rate"):
        values = np.asarray([part[name] for part in by_hand])
        assert found[name] == pytest.approx((values * weights).sum() / weights.sum(), rel=1e-6)
    logs = np.log([part["perplexity"] for part in by_hand])  # of tokens, not of batches
    expected = np.exp((logs * weights).sum() / weights.sum())
    assert found["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_the_teachers_own_perplexity_is_what_it_said_of_its_tokens():
    topk = top_k_logprobs(builders.teacher_logits(TARGETS), 3)
    said = np.take_along_axis(LOG_P, BATCH.target_ids_BN[..., None], -1)[..., 0]
    scored = ScoredText([(BATCH, TopKTargets(topk, jnp.asarray(said, jnp.float32)))], 4)
    found = scoring.own_perplexity(scored)
    assert found == {"perplexity": pytest.approx(np.exp(-mean(said)), rel=1e-6)}
    assert scoring.own_perplexity(ScoredText([(BATCH, TARGETS)], 4)) == {}
