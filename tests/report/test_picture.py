"""The picture of a run: what is drawn is what the files say, and it can be read in grey."""

import matplotlib.colors
import numpy as np
import pytest
from made_up_runs import evaluation, full_evaluation, metric, three_phases, write_lines
from matplotlib.figure import Figure
from matplotlib.image import imread

from gkdjax import report
from gkdjax.report import picture
from gkdjax.utils.errors import NotWritten

pytestmark = pytest.mark.drawn


def drawn(metrics: list[dict], evaluations: list[dict] = ()) -> Figure:
    return picture.figure(picture.panels(metrics, evaluations))


def series(axes) -> dict[str, tuple[list, list]]:
    """Label -> the points of its line; those of a moving mean are left out."""
    lines = [line for line in axes.lines if line.get_marker()]
    assert len({line.get_label() for line in lines}) == len(lines)
    return {line.get_label(): tuple(map(list, line.get_data())) for line in lines}


def of(lines: list[dict], key: str) -> tuple[list, list]:
    return [line["step"] for line in lines], [line[key] for line in lines]


def write(directory, metrics: list[dict], evaluations: list[dict] | None = None):
    for name, lines in (("metrics", metrics), ("eval", evaluations)):
        if lines is not None:
            write_lines(directory / f"{name}.jsonl", lines)


@pytest.mark.parametrize("steps", [12, 300])
def test_each_kind_of_loss_is_a_series_of_its_own(steps):
    metrics = three_phases(steps)
    (axes,) = drawn(metrics).axes
    warm, later = metrics[: steps // 3], metrics[steps // 3 :]
    assert series(axes) == {
        "off-policy, forward_kl": of(warm, "loss"),
        "off-policy, reverse_kl": of([m for m in later if not m["on_policy_rows"]], "loss"),
        "on-policy, reverse_kl": of([m for m in later if m["on_policy_rows"]], "loss"),
        "anchor": of(metrics, "anchor_loss"),
    }


def test_many_steps_have_a_thick_moving_mean():
    (axes,) = drawn([metric(i, 1.0 + (i % 2)) for i in range(300)]).axes
    raw, mean = axes.lines
    assert mean.get_linewidth() > 3 * raw.get_linewidth()
    np.testing.assert_array_equal(mean.get_xdata(), raw.get_xdata())
    np.testing.assert_allclose(mean.get_ydata()[20:-20], 1.5)
    assert mean.get_ydata()[0] == pytest.approx(1.5, abs=0.1)  # not pulled towards 0


def test_the_panels_show_the_files_numbers_over_the_same_steps():
    evaluations = [full_evaluation(step) for step in (0, 5, 20)]
    figure = drawn(three_phases(10), evaluations)
    wanted = {}
    for panel, names in {
        "distance to the teacher": {"forward KL": "forward_kl", "reverse KL": "reverse_kl"},
        "agreement with the teacher": {
            "top-1 agreement": "top1_agreement",
            "acceptance": "acceptance_rate",
        },
        "perplexity": {"perplexity": "perplexity"},
    }.items():
        wanted[panel] = {
            f"{label}, {whose}'s text": of(evaluations, f"{whose}_text/{name}")
            for whose in ("teacher", "student")
            for label, name in names.items()
        }
    validation = {"loss": "loss", "forward KL": "forward_kl", "reverse KL": "reverse_kl"}
    wanted["validation"] = {k: of(evaluations, f"validation/{n}") for k, n in validation.items()}
    wanted["perplexity"]["perplexity, validation"] = of(evaluations, "validation/perplexity")
    del validation["loss"]
    wanted["side effects"] = {
        k: of(evaluations, f"side_effects/{n}") for k, n in validation.items()
    }
    wanted["right answers"] = {"accuracy": of(evaluations, "accuracy")}
    assert {axes.get_title(): series(axes) for axes in figure.axes[1:]} == wanted
    for axes in figure.axes[2:4]:  # shares
        low, high = axes.get_ylim()
        assert -0.1 < low < 0 and 1 < high < 1.1
    width, height = figure.get_size_inches()
    assert len(figure.axes) == 7 and width > height  # two columns
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert figure.axes[0].get_xlim()[1] > 20
    named = [axes.get_title() for axes in figure.axes if axes.get_xlabel()]
    assert named == ["perplexity", "side effects"]  # the lowest of each column


def test_what_was_not_measured_is_not_drawn():
    lines = [evaluation(0, texts=("teacher_text",)), evaluation(3)]
    _, divergence, *others = drawn([metric(0, 1.0)], lines).axes
    assert series(divergence)["forward KL, student's text"][0] == [3]
    assert [axes.get_title() for axes in others] == ["agreement with the teacher", "perplexity"]
    _, divergence, *_ = drawn([metric(0, 1.0)], lines[:1]).axes
    assert not [label for label in series(divergence) if "student" in label]
    for bad in (float("nan"), float("inf"), None):
        lines = [{"step": step, "teacher_text/perplexity": 2.0 + step} for step in (0, 1)]
        lines.append({"step": 2, "teacher_text/perplexity": bad})
        axes = drawn([metric(0, 1.0)], lines).axes[-1]
        assert series(axes) == {"perplexity, teacher's text": ([0, 1], [2.0, 3.0])}


@pytest.mark.parametrize("steps", [6, 300])
def test_no_two_lines_of_a_panel_look_alike_without_colour(steps):
    panels = drawn(three_phases(steps), [full_evaluation(step) for step in (0, 5)]).axes
    assert [len(axes.lines) > 1 for axes in panels].count(False) == 1  # accuracy is alone
    for axes in panels:
        marked = [line for line in axes.lines if line.get_marker()]
        # A line of one point has no dashes; a mean has no marker.
        for looks in (
            [(line.get_linestyle(), line.get_marker()) for line in axes.lines],
            [(line.get_marker(), line.get_fillstyle()) for line in marked],
            [line.get_linestyle() for line in axes.lines if not line.get_marker()],
        ):
            assert len(set(looks)) == len(looks)
        for line in axes.lines:  # dark enough on white
            grey = np.dot(matplotlib.colors.to_rgb(line.get_color()), [0.299, 0.587, 0.114])
            assert 1 - (line.get_alpha() or 1.0) * (1 - grey) < 0.7
        named = [text.get_text() for text in axes.get_legend().get_texts()]
        assert named == list(series(axes))


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([2.0, 0.1], "log"),
        ([2.0, 0.3], "linear"),
        ([2.0, 0.0], "symlog"),
        ([2.0, -1e-9], "symlog"),
        ([0.0], "linear"),
    ],
)
def test_the_scale_holds_zeros_and_rounding_below(losses, scale, tmp_path):
    metrics = [metric(i, loss) for i, loss in enumerate(losses)]
    evaluations = [{"step": i, "teacher_text/forward_kl": kl} for i, kl in enumerate(losses)]
    training, divergence = drawn(metrics, evaluations).axes
    assert training.get_yscale() == divergence.get_yscale() == scale
    low, high = training.get_ylim()
    assert low < min(losses) and high > max(losses)
    write(tmp_path, metrics, evaluations)
    report.draw(tmp_path)  # no warning is an assertion too


@pytest.mark.parametrize("evaluations", [None, [], [evaluation(0)], [evaluation(0), evaluation(1)]])
def test_short_runs_make_a_picture(evaluations, tmp_path):
    write(tmp_path, [metric(0, 1.5)], evaluations)
    path = report.draw(tmp_path)
    assert path == tmp_path / "report.png"
    assert (imread(path)[..., :3].min(-1) < 0.5).sum() > 1000  # something is drawn on the white


@pytest.mark.parametrize("metrics", [[metric(0, 1.0)], three_phases(40)])
def test_the_steps_axis_shows_whole_steps_from_0(metrics):
    axes = drawn(metrics).axes[-1]
    low, high = axes.get_xlim()
    assert low < 0 <= metrics[-1]["step"] < high
    np.testing.assert_array_equal(axes.get_xticks(), np.round(axes.get_xticks()))


def test_the_same_files_give_the_same_picture_and_a_failure_leaves_the_old(tmp_path, monkeypatch):
    write(tmp_path, three_phases(60), [evaluation(0), evaluation(60)])
    first = report.draw(tmp_path).read_bytes()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')  # a line that is cut off is left out
    assert report.draw(tmp_path).read_bytes() == first
    write(tmp_path, three_phases(60), [evaluation(0), evaluation(59)])
    other = report.draw(tmp_path).read_bytes()
    assert other != first

    def fail(figure, path, **options):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(NotWritten, match="no space"):
        report.draw(tmp_path)
    assert (tmp_path / "report.png").read_bytes() == other
    assert list(tmp_path.glob("*.part")) == []


def test_a_line_of_very_many_steps_keeps_its_highest_and_lowest():
    steps = np.arange(50_000)
    values = 1.0 + np.sin(steps / 1e4) ** 2
    values[31_234], values[777] = 9.0, 0.1
    line = picture.Series("loss", picture.Look("-", "o", picture.BLUE), steps, values)
    (axes,) = picture.figure([picture.Panel("loss", [line], noisy=True)]).axes
    thin = dict(zip(*axes.lines[0].get_data(), strict=True))
    assert len(thin) <= 2000 and thin[31_234] == 9.0 and thin[777] == 0.1
    assert all(values[int(step)] == value for step, value in thin.items())
    assert list(thin) == sorted(thin)


def test_names_are_no_formulas(tmp_path):
    write(tmp_path, [metric(0, 1.0, "$x^$\x00", **{"anchor_$a_b$_loss": 0.5})])
    report.draw(tmp_path)
    (axes,) = drawn([metric(0, 1.0, "$x^$")]).axes
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [r"off-policy, \$x^\$"]
