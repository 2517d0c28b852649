"""That a batch costs the same behind a short and a long prefix, but for the attention to it."""

import builders
import pytest

from gkdjax.benchmarks import prefix_length

pytestmark = pytest.mark.slow(20)


def test_the_work_beside_attention_does_not_grow_with_the_prefix():
    spec = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    decoder, params = builders.small_model(vocab_size=prefix_length.VOCAB, **spec)
    found = {}
    for P in (64, 512):
        way = prefix_length.after_a_prefix(decoder, 2, P, 8)
        found[P] = prefix_length.operations(decoder, params, way, 2, P, 8)
    (short, of_short), (long, of_long) = found.values()
    assert of_long == 8 * of_short > 0.1 * short
    assert long - of_long == pytest.approx(short - of_short, rel=0.05)


def test_the_command_prints_its_table(monkeypatch, capsys):
    arguments = ["--shape=tiny", "--prefix", "8", "24", "--rows=2", "--length=4", "--rounds=2"]
    monkeypatch.setattr("sys.argv", ["prefix_length", *arguments])
    prefix_length.main()
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith("prefix") and [line.split()[0] for line in lines] == ["8", "24"]
    assert lines[0].split()[2] == "1.00"
