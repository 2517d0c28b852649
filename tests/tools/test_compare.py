"""Runs side by side: what is compared, what is refused, and the picture of their curves."""

import pathlib
import subprocess
import sys

import made_up_runs as made
import matplotlib.colors
import numpy as np
import pytest
from matplotlib.image import imread

from gkdjax.report import tables
from gkdjax.tools import compare

pytestmark = pytest.mark.drawn

ROOT = pathlib.Path(__file__).parents[2]
OTHER = {"rows": 8, "crc32": 1}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The picture is written into the working directory unless --out is given."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def run(*args) -> int:
    return compare.main([str(arg) for arg in args])


def shown(*directories: pathlib.Path) -> dict[str, dict[str, list[str]]]:
    """Title -> name of a row -> its cells."""
    made_of = compare.side_by_side(compare.read(directories))
    return {table.title: {row[0]: [*row[1:]] for row in table.rows} for table in made_of}


def panels(*directories: pathlib.Path) -> dict:
    figure = compare.figure(compare.read(directories))
    return {axes.get_title(): axes for axes in figure.axes}


def points(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): tuple(map(list, line.get_data())) for line in axes.lines}


def test_runs_side_by_side(tmp_path, capsys):
    a = made.write_finished(tmp_path / "a")
    changed = {"student": made.condition(3) | {"accuracy": 0.5}, "recovery": None}
    b = made.write_finished(tmp_path / "b", changed, optim={"learning_rate": 0.01})
    found = shown(a, b)
    assert found["Runs"]["state"] == ["finished, 60 steps"] * 2
    assert found["Config, where it differs"] == {"optim.learning_rate": ["0.0002", "0.01"]}
    answers = found["Right answers"]
    assert answers["student, accuracy"] == ["96.2% [94.2, 97.5]", "50.0% [45.7, 54.3]"]
    assert found["Recovery of the prefix"]["questions"] == ["0.977", "not defined"]
    assert found["Side effects"]["forward KL"] == ["0.0600", "0.0600"]
    assert run(a, b) == 0
    told = capsys.readouterr().out
    assert told.endswith("\ncompare.png\n") and imread("compare.png").shape[2] == 4
    for title, rows in found.items():
        assert f"\n{title}\n" in f"\n{told}"
        for name, cells in rows.items():
            assert any(
                line.startswith(name) and line.split() == [*name.split(), *" ".join(cells).split()]
                for line in told.splitlines()
            )


def test_every_number_of_a_run_is_compared(tmp_path):
    a = made.write_finished(tmp_path / "a")
    found = shown(a)
    for (title, name), cell in tables.cells(tables.tables(made.full_results())):
        assert found[title][name] == [cell]
    assert "Config, where it differs" not in found


def test_what_a_run_does_not_have_is_a_dash(tmp_path):
    a = made.write_finished(tmp_path / "a")
    without = {"side_effects": {}, "prefix_cost": {}, "reprompted_student": {}}
    b = made.write_finished(tmp_path / "b", without)
    found = shown(b, a)
    assert found["Side effects"]["reverse KL"] == ["-", "0.0300"]
    assert found["Cost of the prefix"]["seconds with it"] == ["-", "2.000 (2.50x)"]
    assert found["Right answers"]["reprompted student, held-out"][0] == "-"


def test_unfinished_runs_are_marked_and_shown_with_what_they_have(tmp_path, capsys):
    a = made.write_finished(tmp_path / "a")
    b = made.write_unfinished(tmp_path / "b")
    begun = made.write_begun(tmp_path / "begun")
    with (b / "eval.jsonl").open("a") as file:
        file.write('{"step": 4')
    found = shown(a, b, begun)
    state = ["finished, 60 steps", "not finished, step 20 of 60", "not finished, step 0 of 60"]
    assert found["Runs"]["state"] == state
    assert found["Right answers"]["base, accuracy"] == ["3.1% [1.9, 5.0]"] * 2 + ["-"]
    assert found["Right answers"]["student, accuracy"][1:] == ["-", "-"]
    assert found["Training"]["steps"] == ["60", "20", "-"]
    assert run(a, b, begun) == 0
    told = capsys.readouterr().out
    header = told.splitlines()[1].split()
    assert header == ["a", "b", "*", "begun", "*"] and "\n* not finished\n" in told
    assert "b: eval.jsonl: the last line is cut off, and left out" in told


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / part / "run" for part in ("x/a", "y/a", "y/b")]
    for path in paths:
        made.write_begun(path)
    assert list(compare.read(paths)) == ["x/a/run", "y/a/run", "y/b/run"]
    assert list(compare.read(paths[1:])) == ["a/run", "b/run"]
    assert list(compare.read(paths[:1])) == ["run"]


def test_a_run_is_not_compared_with_itself(tmp_path, capsys, monkeypatch):
    a = made.write_begun(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert run(a, "a") == 2
    assert "a is named twice" in capsys.readouterr().err


def task(**changed: dict) -> dict:
    return {"task": made.TASK | {k.replace("__", "."): v for k, v in changed.items()}}


def without(*names: str) -> dict:
    return {"task": {name: of for name, of in made.TASK.items() if name not in names}}


def test_runs_that_were_asked_different_things_are_refused(tmp_path, capsys):
    a = made.write_finished(tmp_path / "a")
    b = made.write_finished(tmp_path / "b", task(questions=OTHER, retention__sort=OTHER))
    c = made.write_finished(tmp_path / "c", task(retention__sort=OTHER))
    assert run(a, b, c, "--out=x.png") == 2
    told = capsys.readouterr()
    assert told.out == "" and not pathlib.Path("x.png").exists()
    assert "differ in questions (a, c / b); retention.sort (a / b, c)" in told.err
    assert "prompts" not in told.err.split("Compare runs")[0]
    assert run(b, a) == 2  # whichever comes first


def test_an_unfinished_run_of_another_task_is_refused_too(tmp_path, capsys):
    a = made.write_finished(tmp_path / "a", task(heldout=OTHER))
    b = made.write_unfinished(tmp_path / "b")
    assert run(a, b) == 2
    assert "differ in heldout (a / b)" in capsys.readouterr().err


def test_a_set_that_one_run_lacks_is_no_difference(tmp_path):
    a = made.write_finished(tmp_path / "a")
    b = made.write_finished(tmp_path / "b", without("heldout", "retention.sort"))
    assert list(compare.read([a, b])) == ["a", "b"]


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        # The distance is taken on the questions where there are no prompts.
        (without("prompts"), task(), "prompts (a / b)"),
        # Side effects are taken on all of retention where there are no prompts for them.
        (task(), task(side_effects=OTHER), "side_effects (a / b)"),
        (task(), task(retention__more=OTHER), "side_effects (a / b)"),
    ],
)
def test_measures_of_one_name_that_were_taken_on_other_rows(tmp_path, capsys, one, other, told):
    a, b = (made.write_finished(tmp_path / n, of) for n, of in (("a", one), ("b", other)))
    assert run(a, b) == 2
    assert told in capsys.readouterr().err


def test_the_order_of_abilities_is_no_difference(tmp_path):
    more = task(retention__more=OTHER)
    back = {"task": dict(reversed(more["task"].items()))}
    paths = [made.write_finished(tmp_path / n, of) for n, of in (("a", more), ("b", back))]
    assert list(compare.read(paths)) == ["a", "b"]


def test_a_run_alone(tmp_path):
    a = made.write_finished(tmp_path / "a")
    assert run(a) == 0
    assert pathlib.Path("compare.png").exists()


def test_the_curves_lie_over_each_other(tmp_path):
    a = made.write_finished(tmp_path / "a")
    b = made.write_unfinished(tmp_path / "b")
    made.write_lines(b / "eval.jsonl", [made.evaluation(step) for step in (0, 7)])
    found = panels(a, b)
    assert list(found) == [
        *("training loss (of several divergences)", "forward KL, teacher's text"),
        *("forward KL, student's text", "right answers", "perplexity, teacher's text"),
        *("validation loss", "side effects, forward KL"),
    ]
    distance = points(found["forward KL, teacher's text"])
    wanted = [made.full_evaluation(step)["teacher_text/forward_kl"] for step in made.SCHEDULE]
    assert distance["a"] == ([*made.SCHEDULE], wanted)
    assert distance["b"][0] == [0, 7]
    assert list(points(found["right answers"])) == ["a"]
    loss = points(found["training loss (of several divergences)"])
    assert len(loss["a"][0]) == 60 and loss["b"][0] == [*range(20)]
    assert loss["b"][1] == [line["loss"] for line in made.three_phases(60)[:20]]
    raw = [line["loss"] for line in made.three_phases(60)]
    assert np.std(np.diff(loss["a"][1])) < np.std(np.diff(raw)) / 2  # a moving mean


def test_losses_of_one_kind_say_which(tmp_path):
    a = made.write_begun(tmp_path / "a")
    made.write_lines(a / "metrics.jsonl", [made.metric(i, 1.0) for i in range(3)])
    assert list(panels(a)) == ["training loss, forward_kl"]


def test_a_run_without_a_step_has_an_empty_picture(tmp_path):
    made_of = compare.figure(compare.read([made.write_begun(tmp_path / "a")]))
    assert len(made_of.axes) == 1 and not made_of.axes[0].lines


def test_many_runs_can_be_told_apart_without_colour(tmp_path):
    paths = [made.write_unfinished(tmp_path / f"run{i}") for i in range(28)]
    made_of = compare.figure(compare.read(paths))
    (legend,) = made_of.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named == [f"run{i} (not finished, step 20 of 60)" for i in range(28)]
    for axes in made_of.axes:
        looks = {(line.get_marker(), line.get_linestyle()) for line in axes.lines}
        assert len(looks) == len(axes.lines) == 28
        for line in axes.lines:
            grey = np.dot(matplotlib.colors.to_rgb(line.get_color()), [0.299, 0.587, 0.114])
            assert grey < 0.7


def test_names_of_directories_are_no_formulas_and_no_codes(tmp_path, capsys):
    a = made.write_unfinished(tmp_path / "_a$x^$")
    b = made.write_unfinished(tmp_path / "b\x1b[2J")
    assert run(a, b) == 0
    told = capsys.readouterr().out
    assert r"_a$x^$" in told and r"b\x1b[2J" in told and "\x1b" not in told
    (legend,) = compare.figure(compare.read([a, b])).legends
    assert len(legend.get_texts()) == 2


@pytest.mark.parametrize("out", ["new/deep", "there", "file.png", "deep/file.png", "dotted.d"])
def test_where_the_picture_goes(tmp_path, capsys, out):
    a = made.write_begun(tmp_path / "a")
    pathlib.Path("there").mkdir()
    pathlib.Path("dotted.d").mkdir()
    assert run(a, f"--out={out}") == 0
    wanted = pathlib.Path(out if out.endswith(".png") else f"{out}/compare.png")
    assert capsys.readouterr().out.endswith(f"\n{wanted}\n")
    assert [path for path in pathlib.Path().rglob("*") if path.is_file()] == [wanted]


def test_a_picture_that_cannot_be_written_is_named(tmp_path, capsys):
    a = made.write_begun(tmp_path / "a")
    assert run(a, "--out=picture.svg") == 2
    assert "name a directory, or a file that ends in .png" in capsys.readouterr().err
    assert run(a, f"--out={a / 'config.json' / 'x'}") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_what_is_no_run_is_named(tmp_path, capsys):
    a = made.write_begun(tmp_path / "a")
    assert run(a, tmp_path / "none") == 2
    assert f"{tmp_path / 'none'} holds no config.json" in capsys.readouterr().err
    assert list(pathlib.Path().iterdir()) == []
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 2


def test_the_command_line(tmp_path):
    a, b = (made.write_unfinished(tmp_path / name) for name in "ab")
    command = [sys.executable, "-m", "gkdjax.tools.compare", a, b, f"--out={tmp_path / 'x.png'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith(f"\n{tmp_path / 'x.png'}\n") and done.stderr == ""
