"""The step benchmark with tiny models: its variants do the same step; ratios are within a round."""

import functools

import numpy as np
import pytest

from gkdjax.benchmarks import harness, train_step
from gkdjax.benchmarks.train_step import PLAIN, UNFUSED, Case

SIZES = "--student=tiny --teacher=tiny --rows=4 --length=12 --chunk_size=20 --steps=2"


@functools.cache
def losses(variant: str, top_k: int = 48, tuning: str = "lora", prompts: str = "half"):
    a = train_step.parse([*SIZES.split(), f"--top_k={top_k}"])
    return np.asarray(train_step.measure(Case(48, tuning, prompts, variant), a)["losses"])


@pytest.mark.slow(60)
def test_all_variants_do_the_same_step():
    unfused = losses(UNFUSED)
    assert len(unfused) == 3
    assert 0.1 < unfused[-1] < 0.99 * unfused[0]  # a step that changes nothing is none
    for variant in (PLAIN, "dense", "topk"):  # K is all of V
        np.testing.assert_allclose(losses(variant), unfused, rtol=1e-5)
    topk = losses("topk", top_k=8)
    assert 0 < topk[0] < unfused[0]  # fewer tokens than the vocabulary are a lower bound
    np.testing.assert_allclose(losses("stored", top_k=8), topk, rtol=1e-5)
    unfused = losses(UNFUSED, tuning="full", prompts="none")
    assert unfused[-1] < 0.999 * unfused[0]
    np.testing.assert_allclose(losses("dense", tuning="full", prompts="none"), unfused, rtol=1e-5)


def round_of(seconds: float, peak_gib: float) -> dict:
    peak = peak_gib * harness.GIB
    return {"seconds": seconds, "cpu_seconds": 2 * seconds, "peak_bytes": peak, "temp_bytes": 0}


def test_ratios_are_taken_within_a_round():
    unfused, dense = (Case(48, "lora", "half", variant) for variant in (UNFUSED, "dense"))
    results = {
        unfused: [round_of(2.0, 4.0), round_of(20.0, 4.0), round_of(3.0, 4.0)],
        dense: [round_of(1.0, 1.0), round_of(5.0, 2.0), round_of(2.0, 2.0)],
    }
    *_, first, second = train_step.summary(results, 4 * 12).splitlines()
    assert first.split()[-3:] == ["1.00"] * 3
    # 2.0 of 2, 4 and 1.5; 0.5 of 1/4, 1/2 and 1/2.
    assert second.split()[4:] == ["2.00", "4.00", "24", "2.00", "0.00", "2.00", "0.50", "0.50"]
    alone = train_step.summary({dense: results[dense]}, 4 * 12)
    assert alone.split()[-3:] == ["-"] * 3


def test_each_round_measures_every_case_and_a_failed_process_is_named(tmp_path):
    calls = []
    cases = {name: lambda name=name: calls.append(name) or {"seconds": 1} for name in "ab"}
    results = harness.rounds(cases, 2, str(tmp_path / "out.json"))
    assert (calls, len(results["a"])) == ([*"abab"], 2)
    with pytest.raises(RuntimeError, match="No module named"):
        harness.in_new_process("gkdjax.benchmarks.nothing")
    default = train_step.plan(train_step.parse([]))
    named = train_step.plan(train_step.parse(["--tuning", "lora", "full"]))
    assert [len(default), len(named)] == [28, 32]  # one setting takes minutes
