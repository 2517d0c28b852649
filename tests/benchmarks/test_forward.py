"""The operations that the forward benchmark counts."""

import math

import pytest

from gkdjax.benchmarks import forward
from gkdjax.models.decoder_config import param_shapes


@pytest.mark.parametrize(("model", "billions"), [("gemma3-1b", 1.0), ("qwen3-4b", 4.02)])
def test_the_shapes_are_the_published_ones(model, billions):
    sizes = param_shapes(forward.MODELS[model]).values()
    assert sum(map(math.prod, sizes)) / 1e9 == pytest.approx(billions, abs=0.01)


def test_operations_of_a_short_row_counted_by_hand():
    spec = forward.MODELS["tiny"]  # two layers of width 24, heads 2 and 1 of 8, MLP 48
    kernels = 2 * (24 * 16 + 2 * 24 * 8 + 16 * 24 + 3 * 24 * 48)
    pairs = 2 * (1 + 2 + 3)
    assert forward.flops(spec, 5, 3) == 5 * (2 * kernels * 3 + 2 * 2 * 16 * pairs)


def test_a_window_leaves_out_what_it_hides():
    spec = forward.MODELS["gemma3-1b"]
    short, long = forward.flops(spec, 1, 512), forward.flops(spec, 1, 4096)
    every_pair = 2 * 2 * 4 * 256 * 26 * 4096 * 4097 // 2
    assert 8 * short < long < 8 * short + every_pair / 3
