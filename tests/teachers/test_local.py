"""The in-process teacher: what it says at the targets is what its model says there."""

import functools
import types

import builders
import jax
import numpy as np
import pytest

from gkdjax.data.chat_template import Chat
from gkdjax.losses import TopKLogprobs, within
from gkdjax.losses.objective import DenseTargets, TopKTargets
from gkdjax.models.sampler import sample
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.teachers.base import Teacher
from gkdjax.teachers.local import LocalTeacher
from gkdjax.teachers.scoring import request_targets
from gkdjax.types import Prompt, SamplingParams

# Untied and capped, so that a forgotten table or cap shows.
DECODER, PARAMS = builders.small_model(
    seed=2, tie_word_embeddings=False, final_logit_softcapping=2.0
)
BATCH = builders.batch((4, 1, 2, 3), prefix=3)
STOPS = (7, 11)


def teacher(
    top_k: int | None = None,
    temperature: float = 1.0,
    vocab_size: int = 32,
    shared: int | None = None,
    known: int = 32,
) -> LocalTeacher:
    """Its tokenizer knows the ids below `known`, the student's those below `shared`."""
    mesh = parallel_mesh.make_mesh()
    tokenizer = types.SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(known)})
    chat = Chat("a directory", tokenizer, 0, STOPS, "<end>", {}, shared=shared)
    return LocalTeacher(
        *(DECODER, parallel_mesh.replicate(mesh, PARAMS)),
        *(chat, "a teacher"),
        **{"top_k": top_k, "temperature": temperature, "lengths": (6,), "batch_size": 4},
        chunk_size=8,
        mesh=mesh,
        vocab_size=vocab_size,
        prefix_bytes=2**20,
    )


@functools.cache
def logits_by_hand(view: str) -> np.ndarray:
    """float64 [B,N,V]: each row read alone and unpadded, each target at the place before it."""
    tokens, mask = (BATCH.teacher_tokens_BT, BATCH.teacher_mask_BT)
    if view == "student":
        tokens, mask = (BATCH.student_tokens_BS, BATCH.student_mask_BS)

    @jax.jit
    def forward(tokens_BT, mask_BT):
        variables = {"params": PARAMS}
        hidden = DECODER.apply(variables, tokens_BT, mask_BT)
        return DECODER.apply(variables, hidden, method="unembed")

    all_BTV = np.asarray(forward(tokens, mask), np.float64)
    out_BNV = np.zeros((*BATCH.target_mask_BN.shape, all_BTV.shape[-1]))
    for row, row_mask in enumerate(BATCH.target_mask_BN):
        count = int(row_mask.sum())
        end = int(mask[row].sum())
        assert (tokens[row, end - count : end] == BATCH.target_ids_BN[row, :count]).all()
        out_BNV[row, :count] = all_BTV[row, end - count - 1 : end - 1]
    return out_BNV


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def dense() -> DenseTargets:
    return teacher().targets(BATCH)


def test_dense_targets_are_its_logits_where_the_targets_are_predicted(dense):
    assert isinstance(teacher(), Teacher)
    assert isinstance(dense, DenseTargets)
    assert dense.softcap == 2.0
    assert len(dense.hidden_BNE.sharding.device_set) == 4
    got = np.asarray(builders.teacher_logits(dense))[BATCH.target_mask_BN]
    np.testing.assert_allclose(got, logits_by_hand("teacher")[BATCH.target_mask_BN], atol=1e-5)


def test_it_reads_the_prefix(dense):
    got = np.asarray(builders.teacher_logits(dense))[BATCH.target_mask_BN]
    without = logits_by_hand("student")[BATCH.target_mask_BN]
    assert np.abs(got - without).max(axis=-1).min() > 1e-3


@pytest.mark.parametrize("top_k, temperature", [(32, 1.0), (5, 2.0)])
def test_top_k_targets_are_the_best_of_the_dense_ones(top_k, temperature):
    targets = teacher(top_k, temperature).targets(BATCH)
    assert isinstance(targets, TopKTargets)
    assert isinstance(targets.topk, TopKLogprobs)
    assert targets.topk.temperature == temperature
    mask_BN = BATCH.target_mask_BN
    logprobs = log_softmax(logits_by_hand("teacher") / temperature)[mask_BN]
    order = np.argsort(-logprobs, axis=-1)
    ids, values = (np.asarray(x)[mask_BN] for x in (targets.topk.ids, targets.topk.logprobs))
    np.testing.assert_array_equal(ids, order[:, :top_k])
    np.testing.assert_allclose(values, np.take_along_axis(logprobs, ids, axis=-1), atol=1e-5)
    tail = np.asarray(targets.topk.tail_logprob)[mask_BN]
    if top_k == 32:
        assert (tail == -np.inf).all()
    else:
        rest = np.take_along_axis(logprobs, order[:, top_k:], axis=-1)
        np.testing.assert_allclose(tail, np.log(np.exp(rest).sum(axis=-1)), atol=1e-5)
    at_target = np.take_along_axis(logprobs, BATCH.target_ids_BN[mask_BN][:, None], axis=-1)
    np.testing.assert_allclose(
        np.asarray(targets.target_logprob_BN)[mask_BN], at_target[:, 0], atol=1e-5
    )


def test_it_writes_with_its_own_weights_and_stop_ids():
    prompts = [np.array([5, 9, 4], np.int32), np.array([8], np.int32)]
    sampling = SamplingParams(6, temperature=1.5, top_p=0.9)
    asked = [Prompt("a row", ids, ()) for ids in prompts]
    got = teacher().sample(asked, range(2), sampling)
    shapes = {"batch_size": 4, "lengths": (6,)}
    wanted = sample(DECODER, PARAMS, prompts, range(2), sampling, stop_ids=STOPS, **shapes)
    assert [t.ids.tolist() for t in got] == [t.ids.tolist() for t in wanted]
    assert len(got) == 2
    assert all(t.finished == (t.ids[-1] in STOPS) for t in got)


def test_top_k_keeps_to_the_ids_that_the_student_has_too():
    """A student whose checkpoint pads the vocabulary to 20 rows, a teacher with 32."""
    cut = teacher(top_k=20, vocab_size=20).targets(BATCH).topk
    assert cut.ids.max() == 19
    expected = np.sort(log_softmax(logits_by_hand("teacher")[..., :20]), axis=-1)[..., ::-1]
    mask = BATCH.target_mask_BN
    np.testing.assert_allclose(cut.logprobs[mask], expected[mask], atol=1e-5)


def test_tokens_that_the_student_lacks_are_in_the_tail_and_not_renormalised():
    """The student has 20 ids, the teacher's tokenizer 26; 32 rows, of which six are no token."""
    logprobs = log_softmax(logits_by_hand("teacher")[..., :26])[BATCH.target_mask_BN]
    some = teacher(8, shared=20, known=26)
    targets = request_targets(some, BATCH, [""] * 4, None, parallel_mesh.make_mesh())()
    assert targets.shared == 20
    assert some.targets(BATCH).shared is None  # `request_targets` says it, of what was kept as well
    topk = within(targets.topk, targets.shared)
    ids, values, tail = (
        np.asarray(x)[BATCH.target_mask_BN] for x in (topk.ids, topk.logprobs, topk.tail_logprob)
    )
    order = np.argsort(-logprobs, axis=-1)[:, :8]
    best = np.take_along_axis(logprobs, order, axis=-1)
    assert (order >= 20).any() and (order < 20).any(axis=-1).all()
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(values, np.where(order < 20, best, -np.inf), atol=1e-5)
    left = 1 - np.exp(np.where(order < 20, best, -np.inf)).sum(axis=-1)
    np.testing.assert_allclose(np.exp(tail), left, atol=1e-5)


def test_it_writes_no_token_that_the_student_lacks():
    prompts = [Prompt("a row", np.asarray([1, 2, 3 + i], np.int32), ()) for i in range(4)]
    how = SamplingParams(max_new_tokens=12, temperature=3.0, top_p=1.0)
    texts = teacher(shared=20, known=26).sample(prompts, range(4), how)
    assert max(max(text.ids) for text in texts) < 20
    assert max(max(text.ids) for text in teacher().sample(prompts, range(4), how)) >= 20
