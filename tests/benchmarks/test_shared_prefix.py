"""The ways to read a prefix: one result, less work the more is shared, whatever its length."""

import builders
import numpy as np
import pytest

from gkdjax.benchmarks import shared_prefix

pytestmark = pytest.mark.slow(20)
DECODER, PARAMS = builders.small_model(
    vocab_size=shared_prefix.VOCAB, layer_types=["sliding_attention", "full_attention"]
)


def compiled(B: int, P: int, T: int) -> dict:
    """Way -> (program, its arguments)."""
    ways = shared_prefix.ways(DECODER, PARAMS, B, P, T).items()
    return {way: (f.lower(PARAMS, *more).compile(), more) for way, (f, more) in ways}


def flops(program) -> float:
    return program.cost_analysis()["flops"]


def test_the_ways_agree_and_share_the_work():
    ways = [compiled(3, 40, 4)[way] for way in ("each row", "once", "cached")]
    results = [np.asarray(program(PARAMS, *more)) for program, more in ways]
    np.testing.assert_allclose(results[1], results[0], atol=1e-4)
    np.testing.assert_allclose(results[2], results[0], atol=1e-4)
    each_row, once, cached = (flops(program) for program, _ in ways)
    assert each_row > 2 * once > 4 * cached


def test_the_work_beside_attention_does_not_grow_with_the_prefix():
    short, long = (flops(compiled(2, P, 8)["cached"][0]) for P in (64, 512))
    of_short, of_long = (shared_prefix.attention_flops(DECODER, 2, P, 8) for P in (64, 512))
    assert of_long == 8 * of_short > 0.1 * short
    assert long - of_long == pytest.approx(short - of_short, rel=0.05)
