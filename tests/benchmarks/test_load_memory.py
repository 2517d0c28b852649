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


def test_loading_takes_no_second_copy(checkpoint):
    results = [load_memory.in_new_process(checkpoint, fsdp) for fsdp in (1, 4)]
    for result, num_cut in zip(results, (0, 8), strict=True):
        assert SIZE <= result["size"] < 1.5 * SIZE
        # The weights are counted, so the figure is no figure of something else.
        assert result["size"] * 0.95 < result["rise"] <= load_memory.limit(result)
        assert load_memory.limit(result) < 1.3 * result["size"]  # far from twice
        assert len(result["cut"]) == num_cut
        assert all(path.endswith(("_proj", "embedding")) for path in result["cut"])
        assert result["share"] == (0.25 if num_cut else 1.0)
    failed = results[0] | {"rise": load_memory.limit(results[0]) + 1}
    lines = load_memory.report([failed, results[1]]).splitlines()[2:]
    assert [line.split()[5] for line in lines] == ["FAILS", "passes"]


def test_a_copy_that_is_gone_at_the_end_is_seen():
    with load_memory.Peak() as peak:
        both = [np.ones(5_000_000) for _ in range(2)]
        for _ in range(500):
            if peak.bytes < 78e6:
                time.sleep(0.002)  # until it was sampled
        del both
    assert 78e6 < peak.bytes < 100e6


def test_the_checkpoint_is_one_that_the_library_reads(checkpoint):
    decoder, params = load.load_pretrained(checkpoint)
    assert decoder.spec.num_layers == 16
    assert str(params["embedding"].dtype) == "bfloat16"
