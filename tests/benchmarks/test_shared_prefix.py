"""The ways that the prefix benchmark compares: one result, and less work the more is shared."""

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax.benchmarks import shared_prefix

pytestmark = pytest.mark.slow(20)


def test_the_ways_agree_and_share_the_work():
    spec = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    decoder, params = builders.small_model(vocab_size=shared_prefix.VOCAB, **spec)
    results, flops = [], []
    for function, arguments in shared_prefix.ways(decoder, 3, 40, 4).values():
        others = jax.tree.map(jnp.asarray, arguments(params))
        compiled = function.lower(params, *others).compile()
        results.append(np.asarray(compiled(params, *others)))
        flops.append(compiled.cost_analysis()["flops"])
    np.testing.assert_allclose(results[1], results[0], atol=1e-4)
    np.testing.assert_allclose(results[2], results[0], atol=1e-4)
    assert flops[0] > 2 * flops[1] > 4 * flops[2]


def test_the_command_prints_its_table(monkeypatch, capsys):
    arguments = [
        "shared_prefix",
        "--shape=tiny",
        "--prefix=8",
        "--rows=2",
        "--length=4",
        "--rounds=2",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    shared_prefix.main()
    lines = capsys.readouterr().out.splitlines()
    ways = ["each row reads it", "read once", "kept from before"]
    assert [line[: len(way)] for line, way in zip(lines[2:], ways, strict=True)] == ways
