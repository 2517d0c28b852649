"""The command that makes a run's page and picture anew."""

import subprocess
import sys

import made_up_runs as made
import pytest
from matplotlib.image import imread

from gkdjax import report as of_runs
from gkdjax.tools import report

pytestmark = pytest.mark.drawn


def run(*args) -> int:
    return report.main([str(arg) for arg in args])


def test_a_finished_run(tmp_path, capsys):
    directory = made.write_finished(tmp_path / "run")
    wanted = of_runs.write_html(directory).read_bytes(), of_runs.draw(directory).read_bytes()
    paths = directory / "report.html", directory / "report.png"
    for path in paths:
        path.write_text("old")
    assert run(directory) == 0
    assert tuple(path.read_bytes() for path in paths) == wanted
    told = f"{directory}: finished, 60 steps\n{paths[0]}\n{paths[1]}\n"
    assert capsys.readouterr().out == told
    assert list(directory.glob("*.part")) == []


def test_out_leaves_the_run_as_it_is(tmp_path):
    directory = made.write_finished(tmp_path / "run")
    before = sorted(directory.rglob("*"))
    assert run(directory, f"--out={tmp_path / 'page.html'}") == 0
    assert sorted(directory.rglob("*")) == before
    assert "Right answers" in (tmp_path / "page.html").read_text()
    assert imread(tmp_path / "page.png").shape[2] == 4


def test_an_unfinished_run_that_is_being_written_to(tmp_path, capsys):
    directory = made.write_unfinished(tmp_path / "run", step=12)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "los')
    assert run(directory) == 0
    told = capsys.readouterr().out
    assert "not finished, step 12 of 60" in told
    assert "metrics.jsonl: the last line is cut off, and left out" in told
    assert "This run is not finished, step 12 of 60." in (directory / "report.html").read_text()


def test_a_run_that_has_only_begun_has_a_page_that_says_so(tmp_path, capsys):
    directory = made.write_begun(tmp_path / "run")
    assert run(directory) == 0
    assert "step 0 of 60" in capsys.readouterr().out
    assert "before.json" in (directory / "report.html").read_text()
    assert (directory / "report.png").exists()


@pytest.mark.parametrize("kind", ["absent", "empty", "file", "model"])
def test_what_is_no_run_is_named(tmp_path, capsys, kind):
    directory = tmp_path / "there"
    if kind == "file":
        directory.write_text("text")
    elif kind != "absent":
        directory.mkdir()
    if kind == "model":
        (directory / "config.json").write_text('{"model_type": "llama"}')
    assert run(directory, f"--out={tmp_path / 'page.html'}") == 2
    told = capsys.readouterr().err
    assert told.startswith("report: ") and str(directory) in told
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_named(tmp_path, capsys):
    directory = made.write_begun(tmp_path / "run")
    assert run(directory, f"--out={tmp_path / 'page.txt'}") == 2
    assert "page.txt names no page: let it end in .html" in capsys.readouterr().err
    assert run(directory, f"--out={tmp_path / 'no/page.html'}") == 2
    assert "page.html cannot be written" in capsys.readouterr().err
    assert run(directory, f"--out={directory / 'config.json/page.html'}") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_command_line(tmp_path):
    directory = made.write_unfinished(tmp_path / "run")
    command = [sys.executable, "-m", "gkdjax.tools.report", directory]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "step 20 of 60" in done.stdout and done.stderr == ""
    done = subprocess.run([*command[:3], tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "holds no config.json" in done.stderr and done.stdout == ""
