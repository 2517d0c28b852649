"""The step benchmark with tiny models: its variants do the same step, its report is complete."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import compiling
import numpy as np
import pytest

from gkdjax.benchmarks import table, worker
from gkdjax.benchmarks.case import PLAIN, UNFUSED, Case

pytestmark = pytest.mark.slow(120)

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 2


def case(variant: str, **overrides) -> Case:
    fields = {
        "vocab": 48,
        "tuning": "lora",
        "prompts": "half",
        "rows": 4,
        "length": 12,
        "top_k": 48,
        "student": "tiny",
        "teacher": "tiny",
        "dtype": "float32",
        "chunk_size": 20,
        "steps": STEPS,
    }
    return Case(variant=variant, **(fields | overrides))


@functools.cache
def losses(variant: str, **overrides) -> np.ndarray:
    return np.asarray(worker.measure(case(variant, **overrides))["losses"])


def test_with_lora_all_variants_do_the_same_step():
    unfused = losses(UNFUSED)
    assert len(unfused) == 1 + STEPS
    assert 0.1 < unfused[-1] < 0.99 * unfused[0]  # a step that changes nothing is none
    np.testing.assert_allclose(losses(PLAIN), unfused, rtol=1e-5)
    np.testing.assert_allclose(losses("dense"), unfused, rtol=1e-5)
    np.testing.assert_allclose(losses("topk"), unfused, rtol=1e-5)  # K is all of V


def test_fewer_tokens_than_the_vocabulary_are_a_lower_bound_and_a_store_changes_nothing():
    topk = losses("topk", top_k=8)
    assert 0 < topk[0] < losses("dense")[0]
    np.testing.assert_allclose(losses("stored", top_k=8), topk, rtol=1e-5)


def test_with_full_fine_tuning_and_no_prompts_too():
    setting = {"tuning": "full", "prompts": "none"}
    unfused = losses(UNFUSED, **setting)
    assert unfused[-1] < 0.999 * unfused[0]
    np.testing.assert_allclose(losses("dense", **setting), unfused, rtol=1e-5)


def result(seconds: float, peak_gib: float) -> dict:
    return {
        "seconds": [seconds],
        "cpu_seconds": [2 * seconds],
        "losses": [1.0],
        "peak_bytes": peak_gib * 2**30,
        "temp_bytes": 0,
    }


def test_ratios_are_taken_within_a_round():
    unfused = [result(2.0, 4.0), result(20.0, 4.0), result(3.0, 4.0)]
    dense = [result(1.0, 1.0), result(5.0, 2.0), result(2.0, 2.0)]
    rows = table.summarize([(case(UNFUSED), unfused), (case("dense"), dense)])
    assert rows[0]["times_as_fast"] == rows[0]["of_cpu_seconds"] == rows[0]["of_peak"] == 1.0
    assert rows[1]["times_as_fast"] == 2.0  # of 2, 4 and 1.5
    assert rows[1]["of_peak"] == 0.5  # of 1/4, 1/2 and 1/2
    assert rows[1]["seconds"] == 2.0
    assert rows[1]["tokens_per_second"] == 4 * 12 / 2.0


def test_without_the_unfused_step_there_are_no_ratios():
    rows = table.summarize([(case("dense"), [result(1.0, 1.0)])])
    assert rows[0]["of_peak"] is None
    assert table.render(rows).splitlines()[-1].endswith("| - | - | - |")


def start(*arguments: str) -> subprocess.CompletedProcess:
    sizes = ("--student=tiny", "--teacher=tiny", "--rows=2", "--length=8", "--steps=1")
    return subprocess.run(
        [sys.executable, "-m", "gkdjax.benchmarks.train_step", *sizes, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": compiling.QUICK},
    )


def test_table_and_json_are_complete(tmp_path):
    out = tmp_path / "report.json"
    variants = (UNFUSED, "stored")
    process = start(
        "--vocab=64",
        "--tuning=lora",
        "--prompts=half",
        f"--variants={','.join(variants)}",
        "--rounds=1",
        f"--out={out}",
    )
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stdout.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[3] for line in lines[2:]] == [*variants]
    assert len({line.count("|") for line in lines}) == 1
    report = json.loads(out.read_text())
    assert [row["variant"] for row in report["rows"]] == [*variants]
    assert all(value is not None for row in report["rows"] for value in row.values())
    assert all(
        len(entry["rounds"]) == 1 and entry["rounds"][0]["temp_bytes"] > 0
        for entry in report["measured"]
    )
    assert report["where"]["jax"]


def test_an_unknown_choice_is_refused():
    process = start("--variants=fast")
    assert process.returncode
    assert "of unfused, dense, topk, stored, plain" in process.stderr
