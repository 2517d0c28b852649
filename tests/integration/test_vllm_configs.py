"""The tiny modes of the two server configs, as their docstrings tell to run them."""

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


@pytest.mark.parametrize(("name", "least"), [("vllm_teacher", 0.8), ("openai_teacher", 0.6)])
def test_most_of_the_prefix_is_learnt_from_a_real_server(teacher, tmp_path, name, least):
    process = subprocess.run(
        [
            *(sys.executable, "-m", "gkdjax.main", f"--config=configs/{name}.py:tiny"),
            *(f"--workdir={tmp_path}", f"--config.teacher.api_base={teacher.base}"),
        ],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["base"]["exact_match"] == 0.0
    assert results["recovery"] > least
    assert results["teacher"]["bought"] > 0
    assert results["teacher"]["unmapped"] == results["teacher"]["lost"] == 0
    assert "teacher: " in process.stdout
