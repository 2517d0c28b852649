"""Padded shapes: few, each used in the first epoch, and none missing afterwards."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdjax.data import buckets
from gkdjax.models import padding
from gkdjax.utils.errors import UserError

_needs = st.lists(st.tuples(*[st.integers(1, 300)] * 3), min_size=1, max_size=20)


@settings(deadline=None)
@given(needs=_needs, most=st.integers(1, 5), allowed=st.sampled_from([(), (7, 100, 300)]))
def test_every_need_is_held_and_every_shape_is_somebodys_smallest(needs, most, allowed):
    chain = buckets.choose(needs, allowed, most)
    assert 1 <= len(chain) <= most
    taken = set()
    for need in needs:
        shape = buckets.smallest(chain, need)
        assert all(have >= wanted for have, wanted in zip(shape, need, strict=True))
        taken.add(shape)
    assert taken == set(chain)  # nothing is left to be compiled later
    for before, after in itertools.pairwise(chain):
        assert before != after
        assert all(a <= b for a, b in zip(before, after, strict=True))
    if allowed:
        assert {n for shape in chain for n in shape} <= set(allowed)


def test_a_need_that_is_within_the_longest_is_held_though_it_was_not_among_them():
    chain = buckets.choose([(8, 80), (60, 16)], ())
    assert chain == ((64, 16), (64, 80))
    assert buckets.smallest(chain, (60, 80)) == (64, 80)
    with pytest.raises(ValueError, match=r"none of the shapes .* holds \(65, 8\)"):
        buckets.smallest(chain, (65, 8))


def test_other_batches_take_one_more_shape_at_most_and_none_if_they_fit():
    have = ((8, 8), (16, 24))
    assert buckets.extend(have, [(3, 9), (16, 24)], ()) == have
    assert buckets.extend(have, [(3, 9), (17, 2), (9, 30)], ()) == (*have, (24, 32))
    assert buckets.extend(have, [(17, 2)], (8, 16, 24, 64)) == (*have, (24, 24))


def test_one_long_row_does_not_lengthen_all_batches():
    needs = [(20, 40, 10)] * 30 + [(25, 44, 10)] * 30 + [(900, 950, 500)]
    chain = buckets.choose(needs, ())
    assert chain[0] == (24, 40, 16)
    assert buckets.smallest(chain, (25, 44, 10)) == (32, 48, 16)
    assert chain[-1] == (960, 960, 512)


@pytest.mark.parametrize(
    ("length", "rounded"), [(1, 8), (8, 8), (9, 16), (100, 104), (127, 128), (1000, 1024)]
)
def test_lengths_are_rounded_up_by_an_eighth_at_most(length, rounded):
    assert padding.round_up(length, ()) == rounded


def test_a_batch_longer_than_all_allowed_lengths_is_told():
    with pytest.raises(UserError, match=r"a batch needs 17 tokens.*data.bucket_lengths is 16"):
        buckets.choose([(4, 17)], (16, 8))


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (10, (10,)),
        (16, (16,)),
        (17, (16, 17)),
        (64, (16, 32, 48, 64)),
        (100, (16, 32, 48, 64, 96, 100)),
        (256, (16, 32, 48, 64, 96, 128, 192, 256)),
    ],
)
def test_ladder(max_length, expected):
    assert padding.ladder(max_length, ()) == expected
    assert padding.ladder(max_length, (9, 3)) == (3, 9)
