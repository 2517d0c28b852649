"""The command that the README's memory figures come from, on small shapes."""

import os
import re
import subprocess
import sys

import pytest
from readme_commands import README

pytestmark = pytest.mark.slow(30)


def test_both_programs_are_compiled_and_sized():
    process = subprocess.run(
        [
            *(sys.executable, "-m", "gkdjax.benchmarks.gemma3_memory"),
            *("--config=configs/gemma3.py", "--shapes=tiny", "--vocab=4096"),
        ],
        capture_output=True,
        text=True,
        cwd=README.parent,
        env={**os.environ, "XLA_FLAGS": ""},
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    scratch = re.findall(r"^(step|teacher's forward pass) .* (\d+\.\d\d)$", process.stdout, re.M)
    assert [name for name, _ in scratch] == ["step", "teacher's forward pass"]
    assert all(float(size) > 0 for _, size in scratch)


def test_the_readme_names_it():
    configs = README.parent / "configs" / "README.md"
    assert "python -m gkdjax.benchmarks.gemma3_memory" in configs.read_text()
