"""The command that makes a run's page and picture anew."""

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
    printed = f"{directory}: finished, 60 steps\n{paths[0]}\n{paths[1]}\n"
    assert capsys.readouterr().out == printed
    before = sorted(directory.rglob("*"))
    assert run(directory, f"--out={tmp_path / 'page.html'}") == 0
    assert sorted(directory.rglob("*")) == before  # it stays as it is
    assert "Right answers" in (tmp_path / "page.html").read_text()
    assert imread(tmp_path / "page.png").shape[2] == 4


def test_unfinished_runs_have_a_page_that_says_so(tmp_path, capsys):
    directory = made.write_unfinished(tmp_path / "run", step=12)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "los')
    assert run(directory) == 0
    printed = capsys.readouterr().out
    assert "not finished, step 12 of 60" in printed
    assert "metrics.jsonl: the last line is cut off, and left out" in printed
    assert "This run is not finished, step 12 of 60." in (directory / "report.html").read_text()
    begun = made.write_begun(tmp_path / "begun")
    assert run(begun) == 0
    assert "step 0 of 60" in capsys.readouterr().out
    assert "before.json" in (begun / "report.html").read_text()
    assert (begun / "report.png").exists()


@pytest.mark.parametrize("kind", ["absent", "empty", "file", "model"])
def test_a_place_that_is_no_run_is_named(tmp_path, capsys, kind):
    directory = tmp_path / "there"
    if kind == "file":
        directory.write_text("text")
    elif kind != "absent":
        directory.mkdir()
    if kind == "model":
        (directory / "config.json").write_text('{"model_type": "llama"}')
    assert run(directory, f"--out={tmp_path / 'page.html'}") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("report: ") and str(directory) in printed
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_named(tmp_path, capsys):
    directory = made.write_begun(tmp_path / "run")
    for out, named in (
        (tmp_path / "page.txt", "page.txt names no page: let it end in .html"),
        (tmp_path / "no/page.html", "page.html cannot be written"),
        (directory / "config.json/page.html", "cannot be written"),
    ):
        assert run(directory, f"--out={out}") == 2
        assert named in capsys.readouterr().err
