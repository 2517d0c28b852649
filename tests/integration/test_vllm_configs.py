"""The tiny modes of the two server configs, as docstrings and README tell to run them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from gkdjax.config import ASSETS

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def teacher(serve):
    with serve(ASSETS / "quickstart" / "teacher", "teacher") as server:
        yield server


def run(module: str, *arguments: str) -> str:
    """A command of the package -> what it prints."""
    process = subprocess.run(
        [sys.executable, "-m", f"gkdjax.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def results_of(workdir: pathlib.Path) -> dict:
    results = json.loads((workdir / "results.json").read_text())
    assert results["base"]["accuracy"] == 0.0
    assert results["teacher"]["unmapped"] == results["teacher"]["lost"] == 0
    return results


def test_most_of_the_prefix_is_learnt_from_a_server(teacher, tmp_path):
    config = "--config=configs/vllm_teacher.py:tiny", f"--config.teacher.api_base={teacher.base}"
    told = run("main", *config, f"--workdir={tmp_path}")
    results = results_of(tmp_path)
    assert results["recovery"] > 0.8
    assert results["teacher"]["bought"] > 0
    assert "teacher: " in told


def test_what_was_asked_ahead_is_learnt_without_the_server(teacher, tmp_path):
    config = "--config=configs/openai_teacher.py:tiny", f"--workdir={tmp_path}"
    config += (f"--config.teacher.api_base={teacher.base}",)
    assert "USD" in run("tools.cache_teacher", *config, "--estimate", "--input_price=0.5")
    run("tools.cache_teacher", *config)
    run("main", *config, "--config.teacher.offline=True")
    results = results_of(tmp_path)
    assert results["recovery"] > 0.6
    assert results["teacher"]["bought"] == 0
    out = tmp_path / "answers.parquet"
    run("tools.store_info", str(tmp_path / "answers.sqlite"), f"--export={out}")
    assert out.stat().st_size > 0
