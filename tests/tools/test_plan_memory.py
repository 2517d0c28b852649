"""The command, as the README has it."""

import json
import os
import subprocess
import sys

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
