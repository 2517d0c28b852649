"""`collect`: what is taken of a server's word, and what is not."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_answers import score_request

from gkdjax.losses.topk import EPS
from gkdjax.teachers.server.answers import lost_sample
from gkdjax.teachers.server.dialects.logprobs import TokenLogprobs
from gkdjax.teachers.server.dialects.vllm import PromptLogprobs
from gkdjax.utils.errors import WrongAnswer

NAN, INF = math.nan, math.inf


def collected(*tokens, top_k=2, vocab_size=10):
    """An answer from (target, its logprob, {key: logprob}) of each token."""
    read = [TokenLogprobs("here", i, logprob, [*top.items()]) for i, logprob, top in tokens]
    dialect = PromptLogprobs("m", vocab_size)
    return dialect.collect(read, [i for i, *_ in tokens], score_request([5], top_k=top_k))


def test_the_best_k_in_order_and_the_rest_in_the_tail():
    answer = collected(
        (3, -2.0, {3: -2.0, 5: -0.5, 1: -1.5}),  # K + 1: the target is the last of them
        (5, -1.0, {2: -3.0, 5: -1.0}),
        (3, -2.0, {3: -2.0, 1: -2.0, 2: -2.0}),  # the lowest id comes first among equals
    )
    np.testing.assert_array_equal(answer.target_ids, [3, 5, 3])
    np.testing.assert_array_equal(answer.target_logprob, np.float32([-2, -1, -2]))
    np.testing.assert_array_equal(answer.top_ids, [[5, 1], [5, 2], [1, 2]])
    logprobs = np.float32([[-0.5, -1.5], [-1, -3], [-2, -2]])
    np.testing.assert_array_equal(answer.top_logprobs, logprobs)
    np.testing.assert_allclose(np.exp(answer.tail_logprob), 1 - np.exp(logprobs).sum(1), rtol=1e-5)
    assert (answer.finished, answer.unmapped, answer.lost) == (False, 0, False)


def test_no_target_fewer_than_k_and_a_whole_mass():
    for none in (collected(), lost_sample(2, 4)):
        assert none.top_ids.shape == none.top_logprobs.shape == (0, 2)
        assert none.target_ids.shape == none.tail_logprob.shape == (0,)
        assert (none.lost, none.unmapped) in ((False, 0), (True, 4))
    whole = collected((3, 0.0, {3: 1e-7}), top_k=3)
    np.testing.assert_array_equal(whole.top_logprobs, [[0.0, -INF, -INF]])
    assert whole.target_logprob[0] == 0.0
    assert whole.tail_logprob[0] == np.float32(math.log(EPS))


@pytest.mark.parametrize("nothing", [-9999.0, -1e308, -INF])
def test_what_stands_for_no_probability_is_absent(nothing):
    answer = collected((3, nothing, {3: nothing, 5: -0.5}))
    assert answer.target_logprob[0] == -INF
    np.testing.assert_array_equal(answer.top_logprobs, np.float32([[-0.5, -INF]]))


def test_ids_beyond_the_vocabulary_are_dropped_and_counted():
    best = {10: -6.0, 3: -1.0, 2**70: -7.0, -4: -6.5, "no": -8.0, "id": -8.5}
    answer = collected((3, -1.0, best), top_k=4)
    np.testing.assert_array_equal(answer.top_logprobs, np.float32([[-1, -INF, -INF, -INF]]))
    np.testing.assert_allclose(np.exp(answer.tail_logprob), 1 - math.exp(-1), rtol=1e-6)
    assert answer.unmapped == 5
    # what is not among the best K is not counted
    assert collected((3, -1.0, {3: -1.0, 5: -1.5, 10: -6.0})).unmapped == 0
    # a target may be left out where the best are not all known
    assert collected((3, -1.0, {5: -1.1, "no": -1.0})).unmapped == 1


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ((3, -1.0, {3: -1.0, 10: -2.0}), "probability of 0.135 to id 10"),
        ((3, -1.0, {3: -1.0, -1: -2.0}), "to id -1"),
        ((10, -1.0, {3: -1.0}), "id 10 is none of ours"),
        ((-1, -1.0, {3: -1.0}), "id -1 is none of ours"),
        ((3, NAN, {3: -1.0}), "id 3 is nan"),
        ((3, INF, {5: -1.0}), "id 3 is inf"),
        ((3, -1.0, {3: -1.0, 5: NAN}), "id 5 is nan"),
        ((3, 0.01, {3: 0.01}), "above 1"),
        ((3, 0.01, {}), "above 1"),
        ((3, -1.0, {3: -1.0, 5: 0.01}), "above 1"),
        ((3, -0.5, {3: -0.5, 5: -0.7}), "probability of 1.1031 together"),
        ((3, -1.0, {5: -1.1, 6: -2.0}), "not among the best 2"),
        ((3, -1.0, {3: -1.1}), "but -1.1 among the best"),
        ((3, -INF, {3: -1.1}), "but -1.1 among the best"),
    ],
)
def test_what_cannot_be_is_refused(token, why):
    with pytest.raises(WrongAnswer, match="row 7, target 1 of 2: ") as caught:
        collected((4, -1.0, {4: -1.0}), token)
    assert why in str(caught.value)


LOGPROBS = st.floats(-30, -2) | st.sampled_from([NAN, INF, -INF, 0.0, 1.0, -9999.0, -1e308, 1e308])
IDS = st.integers(0, 12) | st.sampled_from([-1, 2**31, 10**30])


@st.composite
def one_token(draw):
    best = draw(st.dictionaries(IDS, st.floats(-30, -2) | LOGPROBS, max_size=7))
    target = draw(st.sampled_from([*best, 3]))
    fits = draw(st.booleans()) and target in best
    return target, best[target] if fits else draw(LOGPROBS), best


@settings(deadline=None)
@given(st.lists(one_token(), max_size=3), st.integers(1, 5), st.integers(1, 12))
def test_an_answer_is_consistent_or_none(tokens, top_k, vocab_size):
    try:
        answer = collected(*tokens, top_k=top_k, vocab_size=vocab_size)
    except WrongAnswer:
        return
    n, there = len(tokens), answer.top_logprobs > -INF
    assert answer.target_ids.dtype == answer.top_ids.dtype == np.int32
    floats = answer.target_logprob, answer.top_logprobs, answer.tail_logprob
    assert {array.dtype for array in floats} == {np.dtype(np.float32)}
    assert answer.top_ids.shape == answer.top_logprobs.shape == (n, top_k)
    assert answer.target_ids.shape == answer.target_logprob.shape == (n,)
    assert all((array <= 0).all() for array in floats)  # which NaN is not
    assert ((answer.target_ids >= 0) & (answer.target_ids < vocab_size)).all()
    assert (np.log(EPS) <= answer.tail_logprob + 1e-6).all()
    assert (answer.top_logprobs[:, 1:] <= answer.top_logprobs[:, :-1]).all()
    assert (answer.top_ids[there] < vocab_size).all()
    for j, (_, _, best) in enumerate(tokens):
        kept = dict(zip(answer.top_ids[j][there[j]], answer.top_logprobs[j][there[j]], strict=True))
        assert len(kept) == there[j].sum()
        assert all(abs(best[i] - logprob) < 1e-3 for i, logprob in kept.items())
        mass = np.exp([*map(float, kept.values())]).sum() + np.exp(float(answer.tail_logprob[j]))
        assert mass == pytest.approx(1.0, abs=2e-3)
