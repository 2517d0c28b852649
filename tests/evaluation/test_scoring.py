"""Means over tokens, against float64 NumPy with all logits at once."""

import dataclasses

import builders
import jax.numpy as jnp
import numpy as np
import pytest

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
TARGETS = builders.dense_targets(BATCH)


@pytest.fixture(scope="module")
def model() -> EvalModel:
    decoder, params = builders.small_model()
    return EvalModel.of(decoder, params, None, prefix_bytes=0)


def agreement(model, *scored, view="student", **gkd):
    text = ScoredText(list(scored), rows=4)
    return scoring.mean_agreement(model, text, view, Gkd(chunk_size=7, **gkd), MESH)


def log_q_of(model, batch, view="student", shared=32):
    hidden_BND = scoring.predicting(model, batch, view, MESH)
    table_VD, spec = model.params["embedding"][:shared], model.decoder.spec
    return log_softmax(builders.logits(hidden_BND, table_VD, spec.final_softcap))


def mean(values_BN) -> float:
    return values_BN[MASK].mean()


def perplexity(log_p, batch) -> float:
    own = np.take_along_axis(log_p, batch.target_ids_BN[..., None], -1)[..., 0]
    return np.exp(-mean(own))


@pytest.mark.parametrize(
    ("view", "shared", "teacher_rows", "k"),
    [
        *(("student", 32, 32, None), ("teacher", 32, 32, None), ("student", 27, 27, None)),
        *(("student", 27, 40, None), ("student", 27, 27, 5), ("student", 27, 40, 5)),
        *(("student", 27, 27, 27), ("student", 27, 40, 27)),
    ],
)
def test_means_are_those_of_the_ids_that_both_models_have(model, view, shared, teacher_rows, k):
    """The student has 32 rows; ids that only the teacher has are tail.

    A dense teacher is renormalised over what both have, as its training has it.
    """
    batch = builders.batch((4, 2, 1, 3), vocab=shared)
    dense = builders.dense_targets(batch, vocab=teacher_rows)
    logits_BNV = builders.teacher_logits(dense)
    log_q = log_q_of(model, batch, view, shared)
    if k is None:
        targets = dataclasses.replace(dense, shared=None if shared == 32 else shared)
        log_p = log_softmax(logits_BNV[..., :shared])
        best, masses = log_p.argmax(-1), [np.ones(MASK.shape)] * 2
        p, q = np.exp(log_p), np.exp(log_q)
    else:
        top_k = top_k_logprobs(logits_BNV, k)
        targets = TopKTargets(top_k, jnp.zeros(MASK.shape), shared=shared)
        ids = np.asarray(top_k.ids)
        best, inside = ids[..., 0], ids < shared
        assert inside.all() == (teacher_rows == shared)
        p = np.take_along_axis(np.exp(log_softmax(logits_BNV)), ids, -1) * inside
        q = np.take_along_axis(np.exp(log_q), np.minimum(ids, shared - 1), -1) * inside
        masses = [p.sum(-1), q.sum(-1)]
        p, q = (np.append(x, np.maximum(1 - x.sum(-1, keepdims=True), 0), -1) for x in (p, q))
        if k == teacher_rows:  # nothing is left of either
            p[..., -1] = q[..., -1] = 0
    with np.errstate(divide="ignore"):
        log_p, log_of_q = np.log(p), np.log(q)
    assert agreement(model, (batch, targets), view=view) == pytest.approx(
        {
            "forward_kl": mean(kl(log_p, log_of_q)),
            "reverse_kl": mean(kl(log_of_q, log_p)),
            "teacher_top_k_mass": mean(masses[0]),
            "student_top_k_mass": mean(masses[1]),
            "top1_agreement": mean((best == log_q.argmax(-1)).astype(float)),
            "acceptance_rate": mean(np.minimum(p, q).sum(-1)),
            "perplexity": perplexity(log_q, batch),
        },
        rel=2e-5,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_perplexity_is_the_students_own_whatever_the_teacher_and_its_temperature(
    model, temperature
):
    top_k = top_k_logprobs(builders.teacher_logits(TARGETS), 5, temperature)
    scored = BATCH, TopKTargets(top_k, jnp.zeros(top_k.ids.shape[:2]))
    found = agreement(model, scored, temperature=temperature, tail="renormalize")
    assert found["perplexity"] == pytest.approx(perplexity(log_q_of(model, BATCH), BATCH), rel=2e-5)


def test_rows_that_fill_a_batch_count_for_nothing_and_means_are_of_tokens(model):
    first = ScoredText([(BATCH, TARGETS)] * 2, rows=4).first(5)
    assert [int(b.target_mask_BN.any(1).sum()) for b, _ in first.batches] == [4, 1]
    found = agreement(model, *first.batches)
    one = dataclasses.replace(BATCH, target_mask_BN=MASK & (np.arange(4)[:, None] < 1))
    parts = [agreement(model, (batch, TARGETS)) for batch in (BATCH, one)]
    weights = [MASK.sum(), MASK[0].sum()]
    for name in ("forward_kl", "acceptance_rate"):
        expected = np.average([part[name] for part in parts], weights=weights)
        assert found[name] == pytest.approx(expected, rel=1e-6)
    expected = np.average(np.log([part["perplexity"] for part in parts]), weights=weights)
    assert found["perplexity"] == pytest.approx(np.exp(expected), rel=1e-6)


def test_the_teachers_own_perplexity_is_what_it_said_of_its_tokens():
    logits_BNV = builders.teacher_logits(TARGETS)
    log_p = log_softmax(logits_BNV)
    said = np.take_along_axis(log_p, BATCH.target_ids_BN[..., None], -1)[..., 0]
    targets = TopKTargets(top_k_logprobs(logits_BNV, 3), jnp.asarray(said, jnp.float32))
    found = scoring.own_perplexity(ScoredText([(BATCH, targets)], 4))
    assert found == {"perplexity": pytest.approx(perplexity(log_p, BATCH), rel=1e-6)}
    assert scoring.own_perplexity(ScoredText([(BATCH, TARGETS)], 4)) == {}
