"""The in-process teacher: what it says at the targets is what its model says there."""

import functools
import types

import builders
import numpy as np
import pytest

from gkdjax.data.chat_template import Chat
from gkdjax.losses import within
from gkdjax.losses.objective import DenseTargets
from gkdjax.models.sampler import sample
from gkdjax.parallel.mesh import make_mesh, replicate
from gkdjax.teachers.base import Teacher
from gkdjax.teachers.local import LocalTeacher
from gkdjax.teachers.scoring import request_targets
from gkdjax.types import Prompt, SamplingParams

# Untied and capped, so that a forgotten table or cap shows.
DECODER, PARAMS = builders.small_model(
    seed=2, tie_word_embeddings=False, final_logit_softcapping=2.0
)
BATCH = builders.batch((4, 1, 2, 3), prefix=3)
MASK_BN = BATCH.target_mask_BN
STOPS = (7, 11)


def teacher(top_k=None, temperature=1.0, vocab_size=32, shared=None, known=32) -> LocalTeacher:
    """Its tokenizer knows the ids below `known`, the student's those below `shared`."""
    tokenizer = types.SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(known)})
    chat = Chat("a directory", tokenizer, 0, STOPS, "<end>", {}, shared=shared)
    how = {"top_k": top_k, "temperature": temperature, "lengths": (6,), "batch_size": 4}
    how |= {"chunk_size": 8, "vocab_size": vocab_size, "prefix_bytes": 2**20}
    mesh = make_mesh()
    return LocalTeacher(DECODER, replicate(mesh, PARAMS), chat, "a teacher", **how, mesh=mesh)


@functools.cache
def logits_by_hand(view: str = "teacher") -> np.ndarray:
    """float64 [n,V] of all targets: each row read alone and unpadded, each one place before it."""
    tokens, mask = BATCH.teacher_tokens_BT, BATCH.teacher_mask_BT
    if view == "student":
        tokens, mask = BATCH.student_tokens_BS, BATCH.student_mask_BS
    hidden = DECODER.apply({"params": PARAMS}, tokens, mask)
    all_BTV = np.asarray(DECODER.apply({"params": PARAMS}, hidden, method="unembed"), np.float64)
    found = []
    for row, row_mask in enumerate(MASK_BN):
        count, end = int(row_mask.sum()), int(mask[row].sum())
        assert (tokens[row, end - count : end] == BATCH.target_ids_BN[row, :count]).all()
        found.append(all_BTV[row, end - count - 1 : end - 1])
    return np.concatenate(found)


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_dense_targets_are_its_logits_where_the_targets_are_predicted():
    local = teacher()
    dense = local.targets(BATCH)
    assert isinstance(local, Teacher) and isinstance(dense, DenseTargets)
    assert len(dense.hidden_BNE.sharding.device_set) == 4
    found = np.asarray(builders.teacher_logits(dense))[MASK_BN]
    np.testing.assert_allclose(found, logits_by_hand(), atol=1e-5)
    # It reads the prefix.
    assert np.abs(found - logits_by_hand("student")).max(axis=-1).min() > 1e-3


# The last two: a student whose checkpoint pads the vocabulary to 20 rows, a teacher with 32; and
# one with 20 ids beside a tokenizer with 26, so that tokens the student lacks are in the tail.
@pytest.mark.parametrize(
    ("top_k", "temperature", "vocabulary", "rows"),
    [
        (32, 1.0, {}, 32),
        (5, 2.0, {}, 32),
        (20, 1.0, {"vocab_size": 20}, 20),
        (8, 1.0, {"shared": 20, "known": 26}, 26),
    ],
)
def test_top_k_targets_are_the_best_of_the_dense_ones(top_k, temperature, vocabulary, rows):
    local = teacher(top_k, temperature, **vocabulary)
    assert local.targets(BATCH).shared is None  # `request_targets` says it, of cached ones as well
    targets = request_targets(local, BATCH, [""] * 4, None, make_mesh())()
    assert targets.shared == vocabulary.get("shared")
    assert targets.topk.temperature == temperature
    topk = within(targets.topk, targets.shared)
    ids, found, tail = (
        np.asarray(x)[MASK_BN] for x in (topk.ids, topk.logprobs, topk.tail_logprob)
    )
    logprobs = log_softmax(logits_by_hand()[:, :rows] / temperature)
    order = np.argsort(-logprobs, axis=-1)[:, :top_k]
    np.testing.assert_array_equal(ids, order)
    there = order < (targets.shared or 32)
    assert there.any(axis=-1).all() and there.all() == ("shared" not in vocabulary)
    best = np.where(there, np.take_along_axis(logprobs, order, axis=-1), -np.inf)
    np.testing.assert_allclose(found, best, atol=1e-5)
    np.testing.assert_allclose(np.exp(tail), 1 - np.exp(best).sum(axis=-1), atol=1e-5)
    if top_k == rows:
        assert (tail == -np.inf).all()
    targets_n1 = BATCH.target_ids_BN[MASK_BN][:, None]
    if targets_n1.max() < rows:
        own = np.take_along_axis(logprobs, targets_n1, axis=-1)[:, 0]
        found = np.asarray(targets.target_logprob_BN)[MASK_BN]
        np.testing.assert_allclose(found, own, atol=1e-5)


def test_it_writes_with_its_own_weights_and_stop_ids_and_the_student_s_tokens():
    prompts = [np.array([5, 9, 4], np.int32), np.array([8], np.int32)]
    asked = [Prompt("a row", ids, ()) for ids in prompts]
    sampling = SamplingParams(6, temperature=1.5, top_p=0.9)
    found = teacher().sample(asked, range(2), sampling)
    how = {"stop_ids": STOPS, "batch_size": 4, "lengths": (6,)}
    wanted = sample(DECODER, PARAMS, prompts, range(2), sampling, **how)
    assert [t.ids.tolist() for t in found] == [t.ids.tolist() for t in wanted]
    assert all(t.finished == (t.ids[-1] in STOPS) for t in found)
    asked = [Prompt("a row", np.asarray([1, 2, 3 + i], np.int32), ()) for i in range(4)]
    how = SamplingParams(max_new_tokens=12, temperature=3.0, top_p=1.0)
    texts = teacher(shared=20, known=26).sample(asked, range(4), how)
    assert max(max(text.ids) for text in texts) < 20
    assert max(max(text.ids) for text in teacher().sample(asked, range(4), how)) >= 20
