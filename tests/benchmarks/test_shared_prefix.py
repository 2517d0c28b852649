"""The ways that the prefix benchmark compares: one result, and less work the more is shared."""

import builders
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import flagsaver

from gkdjax.benchmarks import shared_prefix


@flagsaver.as_parsed(prefix="40", rows="3", length="4")
def test_the_ways_agree_and_share_the_work():
    spec = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    decoder, params = builders.small_model(vocab_size=shared_prefix.VOCAB, **spec)
    results, flops = [], []
    for function, arguments in shared_prefix.ways(decoder, np.random.default_rng(0)).values():
        others = jax.tree.map(jnp.asarray, arguments(params))
        compiled = function.lower(params, *others).compile()
        results.append(np.asarray(compiled(params, *others)))
        flops.append(compiled.cost_analysis()["flops"])
    np.testing.assert_allclose(results[1], results[0], atol=1e-4)
    np.testing.assert_allclose(results[2], results[0], atol=1e-4)
    assert flops[0] > 2 * flops[1] > 4 * flops[2]


@flagsaver.as_parsed(shape="tiny", prefix="8", dtype="float32", rows="2", length="4")
def test_every_round_times_every_way():
    measured = shared_prefix.measure(2)
    assert [len(seconds) for seconds, _ in measured.values()] == [2, 2, 2]
