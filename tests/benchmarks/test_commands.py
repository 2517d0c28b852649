"""Each command runs on tiny shapes and prints its table."""

import importlib
import json
import os
import re
import subprocess
import sys

import compiling
import pytest
from readme_commands import README, ROOMS

pytestmark = pytest.mark.slow(120)


@pytest.mark.parametrize(
    ("name", "arguments", "rows"),
    [
        ("forward", "--rows=2 --length=4 --steps=2 --peak_tflops=0.001", ["tiny .*%"]),
        (
            "shared_prefix",
            "--shape=tiny --prefix 8 24 --rows=2 --length=4 --rounds=2 --ways cached reading",
            *[["8  *cached .* 1.000 ", "8  *reading .* 1.000 ", "24  *cached ", "24  *reading "]],
        ),
        (
            "work_ahead",
            "--shape=tiny --answer_ms=2 --step_ms=2 --length=8 --steps=3 --rounds=2",
            *[["steps alone", "teacher alone", "both", r"both / the longer one: \d+\.\d\d; \w+ "]],
        ),
    ],
)
def test_it_prints_its_table(name, arguments, rows, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, *arguments.split()])
    importlib.import_module(f"gkdjax.benchmarks.{name}").main()
    _, _, *lines = capsys.readouterr().out.splitlines()
    for line, wanted in zip(lines, rows, strict=True):
        assert re.match(wanted, line)


def started(name: str, *arguments: str) -> str:
    """The output of a process: these have flags of absl's, or start processes of their own."""
    process = subprocess.run(
        [sys.executable, "-m", f"gkdjax.benchmarks.{name}", *arguments],
        capture_output=True,
        text=True,
        cwd=README.parent,
        env={**os.environ, "XLA_FLAGS": compiling.QUICK},
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_train_step_measures_in_processes_and_writes_all_it_measured(tmp_path):
    sizes = "--student=tiny --teacher=tiny --rows=2 --length=8 --steps=1 --rounds=1 --vocab=64"
    what = "--tuning=lora --prompts=half --variants unfused stored"
    out = tmp_path / "report.json"
    header, _, *rows, where = started(
        "train_step", *sizes.split(), *what.split(), f"--out={out}"
    ).splitlines()
    assert header.startswith("V") and "jax " in where
    assert [row.split()[:4] for row in rows] == [
        ["64", "lora", "half", x] for x in what.split()[-2:]
    ]
    assert rows[0].split()[-3:] == ["1.00"] * 3
    measured = json.loads(out.read_text())
    assert [entry["rounds"][0]["temp_bytes"] > 0 for entry in measured] == [True, True]


def test_rows_are_measured_in_processes_of_their_own():
    kinds = "--kinds", "one turn, prefix", "prompt alone"
    _, _, *rows, where = started("rows", "--rows=4", "--rounds=1", *kinds).splitlines()
    assert [re.split(" {2,}", row)[:2] for row in rows] == [[kind, "4"] for kind in kinds[1:]]
    assert "jax " in where


def test_gemma3_memory_sizes_both_programs():
    sizes = ("--config=configs/gemma3.py", "--shapes=tiny", "--vocab=4096")
    found = re.findall(r"^(\w.*\w) +\S+ +(\d+\.\d\d)$", started("gemma3_memory", *sizes), re.M)
    assert [name for name, _ in found] == ["step", "teacher's forward pass"]
    assert all(float(size) > 0 for _, size in found)


@pytest.mark.parametrize(
    ("name", "readme"),
    [
        ("gemma3_memory", README.parent / "configs" / "README.md"),
        ("planned_memory", ROOMS / "parallel" / "README.md"),
    ],
)
def test_the_readme_with_its_figures_names_it(name, readme):
    assert f"python -m gkdjax.benchmarks.{name}" in readme.read_text()
