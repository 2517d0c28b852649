"""Half a minute of a soak, and what it would have said of a run that is not equal."""

import json
import os
import subprocess
import sys

import compiling
import pytest

from gkdjax.benchmarks.soak import Life, Run, bought_twice, differences, outcome
from gkdjax.utils.files import read_lines

pytestmark = pytest.mark.slow(90)


def test_half_a_minute_of_kills_and_faults_leaves_no_trace(tmp_path):
    command = [sys.executable, "-m", "gkdjax.benchmarks.soak", "--minutes=0.5", f"--out={tmp_path}"]
    environment = os.environ | {"XLA_FLAGS": compiling.QUICK}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    lives = [Life(**life) for life in results["lives"]]
    assert any(life.code != 0 or life.done for life in lives), lives
    assert (tmp_path / "soak.png").stat().st_size > 1000
    runs = [Run(number, tmp_path / f"run{number}") for number in range(results["runs"])]
    wanted, rows = outcome(runs[0].workdir), read_lines(tmp_path / "teacher.jsonl")
    rows = [row for row in rows if "row" in row]
    assert set(differences(wanted, outcome(runs[1].workdir)).values()) == {0}
    assert bought_twice(runs[0], lives, rows)["twice"] == 0
    # Planted: another byte, a step that is missing, and an answer that is taken once more.
    weights = runs[1].workdir / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    metrics = runs[1].workdir / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    unequal = differences(wanted, outcome(runs[1].workdir))
    assert unequal == {"step": 1, "batch_crc32": 1, "loss": 1, "adapter": 1}
    asked = [row for row in rows if row["asked"] < lives[0].ended]
    assert bought_twice(runs[0], lives, asked + asked[-1:])["twice"] == 1
