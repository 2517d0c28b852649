"""The work-ahead benchmark runs and prints what it says."""

import re

import pytest

from gkdjax.benchmarks import work_ahead

pytestmark = pytest.mark.slow(20)


def test_the_command_prints_its_parts_and_the_ratio(monkeypatch, capsys):
    tiny = ["--shape=tiny", "--answer_ms=2", "--step_ms=2", "--length=8", "--steps=3", "--rounds=2"]
    monkeypatch.setattr("sys.argv", ["work_ahead", *tiny])
    work_ahead.main()
    lines = capsys.readouterr().out.splitlines()
    parts = ["steps alone", "teacher alone", "both"]
    assert [line[: len(part)] for line, part in zip(lines[2:5], parts, strict=True)] == parts
    assert re.fullmatch(r"both / the longer one: \d+\.\d\d; \w+ \d+\.\d\d GiB", lines[5])
