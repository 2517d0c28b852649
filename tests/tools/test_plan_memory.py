"""The command, as the README has it."""

import json
import os
import subprocess
import sys

import pytest
from readme_commands import README, command

QUICKSTART = "--config=configs/quickstart.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "gkdjax.tools.plan_memory", *arguments],
        capture_output=True,
        text=True,
        cwd=README.parent,
        env={**os.environ, "XLA_FLAGS": ""},
        timeout=600,
    )


def test_the_readmes_command_says_what_fits(tmp_path):
    program, *arguments = command("plan").split()
    assert program == "python" and arguments[:2] == ["-m", "gkdjax.tools.plan_memory"]
    done = run(*arguments[2:], f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    assert "v5e-8: fits: " in done.stdout and "8xH100: fits: " in done.stdout
    v5e, h100 = json.loads((tmp_path / "plan.json").read_text())
    assert (v5e["chips"], v5e["devices"], v5e["fits"], v5e["changes"]) == ("v5e-8", 8, True, [])
    most = max(sum(parts.values()) for parts in v5e["phases"].values())
    assert v5e["peak_bytes"] == sum(v5e["held"].values()) + most < v5e["usable_bytes"]
    assert v5e["peak_bytes"] == h100["peak_bytes"] and v5e["seconds"] != h100["seconds"]
    assert all(seconds > 0 for seconds in v5e["seconds"].values())
    assert v5e["seconds_per_step"] == pytest.approx(sum(v5e["seconds"].values()))
    assert v5e["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert v5e["best_mesh"]["peak"] == v5e["peak_bytes"] and not v5e["best_mesh"]["settings"]
    assert v5e["bytes_sent"].keys() == {"gradients, over data"} < v5e["seconds"].keys()


def test_a_mesh_is_planned_as_the_config_has_it():
    done = run(QUICKSTART, "--chips=8xcpu", "--config.mesh.fsdp=2")
    assert done.returncode == 0, done.stderr
    assert "8xcpu: 8 devices on a mesh of data=4, fsdp=2, tensor=1" in done.stdout
    assert "weights, over fsdp" in done.stdout
    assert "best mesh" not in done.stdout  # what fits a CPU is not known
    refused = run(QUICKSTART, "--chips=8xcpu", "--config.mesh.fsdp=3")
    assert refused.returncode == 2 and "fsdp=3 needs a multiple of 3 devices" in refused.stderr


def test_what_does_not_fit_is_told_what_to_change():
    done = run(QUICKSTART, "--chips=v5e-1", "--config.train.batch_size=16384")
    assert done.returncode == 0, done.stderr
    assert "v5e-1: DOES NOT FIT: " in done.stdout
    changes = done.stdout.partition("change, each by itself")[2]
    assert 1 <= changes.count("--config.") <= 3 and "--config.train.remat=True" in changes


def test_a_model_that_cannot_be_had_is_one_line_and_exit_code_2():
    done = run(QUICKSTART, "--config.student.model=no/such")
    assert done.returncode == 2
    assert "'no/such' is no directory here" in done.stderr and "Traceback" not in done.stderr
