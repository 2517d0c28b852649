"""Loading holds no second copy of a checkpoint; with fsdp=4 each device holds a quarter."""

import sys
import time

import numpy as np
import pytest

from gkdjax.benchmarks import load_memory
from gkdjax.models.hf import load

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's"),
    pytest.mark.slow(60),
]
SIZE = 60e6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("checkpoint")
    load_memory.write_checkpoint(directory, SIZE)
    return str(directory)


@pytest.fixture(scope="module")
def results(checkpoint) -> dict[int, dict]:
    """Devices -> what a process with so many measured."""
    return {fsdp: load_memory.in_new_process(checkpoint, fsdp) for fsdp in (1, 4)}


@pytest.mark.parametrize("fsdp", [1, 4])
def test_loading_takes_no_second_copy(results, fsdp):
    result = results[fsdp]
    assert SIZE <= result["size"] < 1.5 * SIZE
    # What was loaded is counted, so the figure is no figure of something else.
    assert result["size"] * 0.95 < result["rise"] <= load_memory.limit(result)
    assert load_memory.limit(result) < 1.3 * result["size"]  # far from twice
    matrices = {path for path in result["cut"] if path.endswith(("_proj", "embedding"))}
    assert len(matrices) == (0 if fsdp == 1 else 8)
    assert matrices == set(result["cut"])
    for path, whole in result["cut"].items():
        assert result["on_device"][path] * fsdp == whole


def test_a_copy_that_is_gone_at_the_end_is_seen():
    with load_memory.Peak() as peak:
        both = [np.ones(5_000_000) for _ in range(2)]
        time.sleep(0.05)  # some samples
        del both
    assert 78e6 < peak.bytes < 100e6


def test_the_checkpoint_is_one_that_the_library_reads(checkpoint):
    decoder, params = load.load_pretrained(checkpoint)
    assert decoder.spec.num_layers == 16
    assert str(params["embedding"].dtype) == "bfloat16"


def test_the_report_gives_a_verdict_and_the_parts(results):
    failed = results[1] | {"rise": load_memory.limit(results[1]) + 1}
    text = load_memory.report([failed, results[4]])
    assert [line.split()[-2] for line in text.splitlines()[2:4]] == ["FAILS", "passes"]
    assert any(line.startswith("layers/down_proj") for line in text.splitlines())
