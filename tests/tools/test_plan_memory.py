"""The command, as the README has it; a process each, as it sets JAX_PLATFORMS for itself."""

import json
import os
import subprocess
import sys

from readme_commands import README, ROOMS, command

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
    program, *arguments = command("plan", ROOMS / "parallel" / "README.md").split()
    assert program == "python" and arguments[:2] == ["-m", "gkdjax.tools.plan_memory"]
    done = run(*arguments[2:], f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    assert "v5e-8: fits: " in done.stdout and "8xH100: fits: " in done.stdout
    assert done.stdout.count("best mesh: this one: ") == 2
    v5e, h100 = json.loads((tmp_path / "plan.json").read_text())
    assert (v5e["chips"], v5e["devices"], v5e["fits"], v5e["changes"]) == ("v5e-8", 8, True, [])
    most = max(sum(parts.values()) for parts in v5e["phases"].values())
    assert v5e["peak_bytes"] == sum(v5e["held"].values()) + most < v5e["usable_bytes"]
    assert v5e["peak_bytes"] == h100["peak_bytes"] and v5e["usable_bytes"] < h100["usable_bytes"]
    assert v5e["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert v5e["best_mesh"] == v5e["fitting_meshes"][0]
    assert v5e["best_mesh"] == {"settings": {}, "peak": v5e["peak_bytes"]}


def test_a_plan_that_does_not_fit_comes_with_changes():
    changes = "--config.train.batch_size=32768", "--config.mesh.fsdp=2"
    done = run(QUICKSTART, "--chips=v5e-2,2xcpu", *changes)
    assert done.returncode == 0, done.stderr
    v5e, cpu = done.stdout.split("2xcpu: ", 1)
    assert "v5e-2: 2 devices on a mesh of data=1, fsdp=2, tensor=1" in v5e
    assert "v5e-2: DOES NOT FIT: " in v5e and "best mesh: none; 0 of 3 meshes of these" in v5e
    advice = v5e.partition("change, each by itself")[2]
    assert 1 <= advice.count("--config.") <= 3 and "--config.train.remat=True" in advice
    assert "how much memory it has is not known" in cpu and "best mesh" not in cpu
