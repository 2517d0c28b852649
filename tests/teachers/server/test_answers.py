"""`collect`: what is taken of a server's word, and what is not."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdjax.losses.topk import EPS
from gkdjax.teachers.server.answers import Position, collect, lost_sample
from gkdjax.utils.errors import WrongAnswer

NAN, INF = math.nan, math.inf


def collected(*positions, top_k=2, vocab_size=10):
    return collect(positions, top_k=top_k, vocab_size=vocab_size, name="row 7")


def test_the_best_k_in_order_and_the_rest_in_the_tail():
    answer = collected(
        Position(3, -2.0, {3: -2.0, 5: -0.5, 1: -1.5}),  # K + 1: the target is the last of them
        Position(5, -1.0, {2: -3.0, 5: -1.0}),
    )
    np.testing.assert_array_equal(answer.target_ids, [3, 5])
    np.testing.assert_array_equal(answer.target_logprob, np.float32([-2, -1]))
    np.testing.assert_array_equal(answer.top_ids, [[5, 1], [5, 2]])
    np.testing.assert_array_equal(answer.top_logprobs, np.float32([[-0.5, -1.5], [-1, -3]]))
    rest = [1 - math.exp(-0.5) - math.exp(-1.5), 1 - math.exp(-1) - math.exp(-3)]
    np.testing.assert_allclose(np.exp(answer.tail_logprob), rest, rtol=1e-6)
    assert (answer.finished, answer.unmapped, answer.lost) == (False, 0, False)


def test_the_lowest_id_comes_first_among_equals():
    answer = collected(Position(3, -2.0, {3: -2.0, 1: -2.0, 2: -2.0}))
    np.testing.assert_array_equal(answer.top_ids, [[1, 2]])


def test_no_position_at_all():
    answer = collected()
    assert answer.top_ids.shape == answer.top_logprobs.shape == (0, 2)
    assert answer.target_ids.shape == answer.tail_logprob.shape == (0,)


def test_fewer_than_k():
    answer = collected(Position(3, -1.0, {3: -1.0}), top_k=3)
    np.testing.assert_array_equal(answer.top_logprobs, np.float32([[-1, -INF, -INF]]))


def test_a_whole_mass_leaves_the_floor():
    answer = collected(Position(3, 0.0, {3: 1e-7}))
    assert answer.target_logprob[0] == answer.top_logprobs[0, 0] == 0.0
    assert answer.tail_logprob[0] == np.float32(math.log(EPS))


@pytest.mark.parametrize("nothing", [-9999.0, -1e308, -INF])
def test_what_stands_for_no_probability_is_absent(nothing):
    answer = collected(Position(3, nothing, {3: nothing, 5: -0.5}))
    assert answer.target_logprob[0] == -INF
    np.testing.assert_array_equal(answer.top_logprobs, np.float32([[-0.5, -INF]]))


def test_ids_beyond_the_vocabulary_are_dropped_and_counted():
    answer = collected(Position(3, -1.0, {10: -6.0, 3: -1.0, 2**70: -7.0, -4: -6.5}, 2), top_k=4)
    np.testing.assert_array_equal(answer.top_logprobs, np.float32([[-1, -INF, -INF, -INF]]))
    np.testing.assert_allclose(np.exp(answer.tail_logprob), 1 - math.exp(-1), rtol=1e-6)
    assert answer.unmapped == 5


def test_what_is_not_among_the_best_k_is_not_counted():
    assert collected(Position(3, -1.0, {3: -1.0, 5: -1.5, 10: -6.0})).unmapped == 0


@pytest.mark.parametrize(
    ("position", "why"),
    [
        (Position(3, -1.0, {3: -1.0, 10: -2.0}), "probability of 0.135 to id 10"),
        (Position(3, -1.0, {3: -1.0, -1: -2.0}), "to id -1"),
        (Position(10, -1.0, {3: -1.0}), "id 10 is none of ours"),
        (Position(-1, -1.0, {3: -1.0}), "id -1 is none of ours"),
        (Position(3, NAN, {3: -1.0}), "id 3 is nan"),
        (Position(3, INF, {5: -1.0}), "id 3 is inf"),
        (Position(3, -1.0, {3: -1.0, 5: NAN}), "id 5 is nan"),
        (Position(3, 0.01, {3: 0.01}), "above 1"),
        (Position(3, 0.01, {}), "above 1"),
        (Position(3, -1.0, {3: -1.0, 5: 0.01}), "above 1"),
        (Position(3, -0.5, {3: -0.5, 5: -0.7}), "probability of 1.1031 together"),
        (Position(3, -1.0, {5: -1.1, 6: -2.0}), "not among the best 2"),
        (Position(3, -1.0, {3: -1.1}), "but -1.1 among the best"),
        (Position(3, -INF, {3: -1.1}), "but -1.1 among the best"),
    ],
)
def test_what_cannot_be_is_refused(position, why):
    with pytest.raises(WrongAnswer, match="row 7, target 1 of 2: ") as caught:
        collected(Position(4, -1.0, {4: -1.0}), position)
    assert why in str(caught.value)


def test_a_target_may_be_left_out_where_the_best_are_not_all_known():
    assert collected(Position(3, -1.0, {5: -1.1}, 1)).unmapped == 1


def test_a_lost_sample_has_no_rows():
    lost = lost_sample(3, 2)
    assert lost.lost
    assert lost.unmapped == 2
    assert lost.top_ids.shape == lost.top_logprobs.shape == (0, 3)
    assert lost.kept().target_logprob.shape == (0,)


LOGPROBS = st.floats(-30, -2) | st.sampled_from([NAN, INF, -INF, 0.0, 1.0, -9999.0, -1e308, 1e308])
IDS = st.integers(0, 12) | st.sampled_from([-1, 2**31, 10**30])


@st.composite
def one_position(draw):
    best = draw(st.dictionaries(IDS, st.floats(-30, -2) | LOGPROBS, max_size=7))
    target = draw(st.sampled_from([*best, 3]))
    fits = draw(st.booleans()) and target in best
    own = best[target] if fits else draw(LOGPROBS)
    return Position(target, own, best, draw(st.integers(0, 3)))


@settings(deadline=None)
@given(st.lists(one_position(), max_size=3), st.integers(1, 5), st.integers(1, 12))
def test_an_answer_is_consistent_or_none(positions, top_k, vocab_size):
    try:
        answer = collected(*positions, top_k=top_k, vocab_size=vocab_size)
    except WrongAnswer:
        return
    n, there = len(positions), answer.top_logprobs > -INF
    assert answer.target_ids.dtype == answer.top_ids.dtype == np.int32
    floats = answer.target_logprob, answer.top_logprobs, answer.tail_logprob
    assert {array.dtype for array in floats} == {np.dtype(np.float32)}
    assert answer.top_ids.shape == answer.top_logprobs.shape == (n, top_k)
    assert answer.target_ids.shape == answer.target_logprob.shape == (n,)
    assert all((array <= 0).all() for array in floats)  # which NaN is not
    assert (answer.target_ids < vocab_size).all()
    assert (answer.target_ids >= 0).all()
    assert (np.log(EPS) <= answer.tail_logprob + 1e-6).all()
    assert (answer.top_logprobs[:, 1:] <= answer.top_logprobs[:, :-1]).all()
    assert (answer.top_ids[there] < vocab_size).all()
    for j, position in enumerate(positions):
        kept = dict(zip(answer.top_ids[j][there[j]], answer.top_logprobs[j][there[j]], strict=True))
        assert len(kept) == there[j].sum()
        assert all(abs(position.best[i] - logprob) < 1e-3 for i, logprob in kept.items())
        mass = np.exp([*map(float, kept.values())]).sum() + np.exp(float(answer.tail_logprob[j]))
        assert mass == pytest.approx(1.0, abs=2e-3)
