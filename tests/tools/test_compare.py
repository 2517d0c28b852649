"""Runs side by side: what is compared, what is refused, and the picture of their curves."""

import pathlib

import made_up_runs as made
import matplotlib.colors
import numpy as np
import pytest
from matplotlib.image import imread

from gkdjax.report import tables
from gkdjax.tools import compare
from gkdjax.utils.errors import UserError

pytestmark = pytest.mark.drawn

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
    found = compare.side_by_side(compare.read(directories))
    return {table.title: {row[0]: [*row[1:]] for row in table.rows} for table in found}


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
    printed = capsys.readouterr().out
    assert printed.endswith("\ncompare.png\n") and imread("compare.png").shape[2] == 4
    lines = [line.split() for line in printed.splitlines()]
    for title, rows in found.items():
        assert f"\n{title}\n" in f"\n{printed}"
        for name, cells in rows.items():
            assert [*name.split(), *" ".join(cells).split()] in lines


def test_every_number_is_compared_and_a_missing_one_is_a_dash(tmp_path):
    a = made.write_finished(tmp_path / "a")
    alone = shown(a)
    for (title, name), cell in tables.cells(tables.tables(made.full_results())):
        assert alone[title][name] == [cell]
    assert "Config, where it differs" not in alone
    without = {"side_effects": {}, "prefix_cost": {}, "reprompted_student": {}}
    found = shown(made.write_finished(tmp_path / "b", without), a)
    assert found["Side effects"]["reverse KL"] == ["-", "0.0300"]
    assert found["Cost of the prefix"]["seconds with it"] == ["-", "2.000 (2.50x)"]
    assert found["Right answers"]["reprompted student, held-out"][0] == "-"


def test_unfinished_runs_are_marked_and_shown_with_their_measures(tmp_path, capsys):
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
    printed = capsys.readouterr().out
    header = printed.splitlines()[1].split()
    assert header == ["a", "b", "*", "begun", "*"] and "\n* not finished\n" in printed
    assert "b: eval.jsonl: the last line is cut off, and left out" in printed


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    paths = [made.write_begun(tmp_path / part / "run") for part in ("x/a", "y/a", "y/b")]
    assert list(compare.read(paths)) == ["x/a/run", "y/a/run", "y/b/run"]
    assert list(compare.read(paths[1:])) == ["a/run", "b/run"]
    assert list(compare.read(paths[:1])) == ["run"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="x/a/run is named twice"):
        compare.read([paths[0], pathlib.Path("x/a/run")])


def task(*without: str, **changed: dict) -> dict:
    found = made.TASK | {name.replace("__", "."): rows for name, rows in changed.items()}
    return {"task": {name: rows for name, rows in found.items() if name not in without}}


MORE = task(retention__more=OTHER)
DIFFERENT = [
    (task(questions=OTHER, retention__sort=OTHER), task(), "questions (a / b); retention.sort ("),
    # The distance is taken on the questions where there are no prompts.
    (task("prompts"), task(), "prompts (a / b)"),
    # Side effects are taken on all of retention where there are no prompts for them.
    (task(), task(side_effects=OTHER), "side_effects (a / b)"),
    (task(), MORE, "side_effects (a / b)"),
]
ALIKE = [
    (task(), task("heldout", "retention.sort")),  # a set that one run lacks
    (MORE, {"task": dict(reversed(MORE["task"].items()))}),  # another order
]


@pytest.mark.parametrize(("one", "other", "named"), DIFFERENT)
def test_measures_of_one_name_that_were_taken_on_other_rows(tmp_path, one, other, named):
    a, b = (made.write_finished(tmp_path / n, of) for n, of in (("a", one), ("b", other)))
    with pytest.raises(UserError) as caught:
        compare.read([a, b])
    assert f"differ in {named}" in str(caught.value)
    with pytest.raises(UserError, match="differ in"):  # whichever comes first
        compare.read([b, a])


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_tasks_that_do_not_differ(tmp_path, one, other):
    paths = [made.write_finished(tmp_path / n, of) for n, of in (("a", one), ("b", other))]
    assert list(compare.read(paths)) == ["a", "b"]


def test_runs_with_different_questions_are_refused(tmp_path, capsys):
    a = made.write_finished(tmp_path / "a")
    b = made.write_finished(tmp_path / "b", task(questions=OTHER, retention__sort=OTHER))
    c = made.write_unfinished(tmp_path / "c")
    assert run(a, b, c, "--out=x.png") == 2
    printed = capsys.readouterr()
    assert printed.out == "" and not pathlib.Path("x.png").exists()
    assert "differ in questions (a, c / b); retention.sort (a, c / b)" in printed.err
    assert "prompts" not in printed.err.split("Compare runs")[0]


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
    raw = [line["loss"] for line in made.three_phases(60)]
    assert loss["b"][1] == raw[:20]
    assert np.std(np.diff(loss["a"][1])) < np.std(np.diff(raw)) / 2  # a moving mean


def test_losses_of_one_kind_say_which_and_no_step_is_an_empty_picture(tmp_path):
    a = made.write_begun(tmp_path / "a")
    (axes,) = panels(a).values()
    assert not axes.lines
    made.write_lines(a / "metrics.jsonl", [made.metric(i, 1.0) for i in range(3)])
    assert list(panels(a)) == ["training loss, forward_kl"]


def test_many_runs_can_be_told_apart_without_colour(tmp_path):
    paths = [made.write_unfinished(tmp_path / f"run{i}") for i in range(28)]
    figure = compare.figure(compare.read(paths))
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named == [f"run{i} (not finished, step 20 of 60)" for i in range(28)]
    for axes in figure.axes:
        looks = {(line.get_marker(), line.get_linestyle()) for line in axes.lines}
        assert len(looks) == len(axes.lines) == 28
        for line in axes.lines:
            grey = np.dot(matplotlib.colors.to_rgb(line.get_color()), [0.299, 0.587, 0.114])
            assert grey < 0.7


def test_names_of_directories_are_no_formulas_and_no_codes(tmp_path, capsys):
    a = made.write_unfinished(tmp_path / "_a$x^$")
    b = made.write_unfinished(tmp_path / "b\x1b[2J")
    assert run(a, b) == 0
    printed = capsys.readouterr().out
    assert r"_a$x^$" in printed and r"b\x1b[2J" in printed and "\x1b" not in printed
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
    for arguments, named in (
        ([a, "--out=picture.svg"], "name a directory, or a file that ends in .png"),
        ([a, f"--out={a / 'config.json' / 'x'}"], "cannot be written"),
        ([a, tmp_path / "none"], f"{tmp_path / 'none'} holds no config.json"),
    ):
        assert run(*arguments) == 2
        assert named in capsys.readouterr().err
    assert list(pathlib.Path().iterdir()) == []
