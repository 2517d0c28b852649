"""The picture of a run: what is drawn is what the files say, and it can be read in grey."""

import matplotlib.colors
import numpy as np
import pytest
from made_up_runs import evaluation, full_evaluation, metric, three_phases, write_lines
from matplotlib.figure import Figure
from matplotlib.image import imread

from gkdjax import report
from gkdjax.report import curves, picture

pytestmark = pytest.mark.drawn


def series(panel) -> dict[str, tuple[list, list]]:
    """Label -> the points of its line; those of a moving mean are left out."""
    lines = [line for line in panel.lines if line.get_marker()]
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
    (panel,) = picture.figure(metrics, []).axes
    warm, later = metrics[: steps // 3], metrics[steps // 3 :]
    assert series(panel) == {
        "off-policy, forward_kl": of(warm, "loss"),
        "off-policy, reverse_kl": of([m for m in later if not m["on_policy_rows"]], "loss"),
        "on-policy, reverse_kl": of([m for m in later if m["on_policy_rows"]], "loss"),
        "anchor": of(metrics, "anchor_loss"),
    }


def test_many_steps_have_a_thick_moving_mean():
    metrics = [metric(i, 1.0 + (i % 2)) for i in range(300)]
    (panel,) = picture.figure(metrics, []).axes
    raw, mean = panel.lines
    assert mean.get_linewidth() > 3 * raw.get_linewidth()
    np.testing.assert_array_equal(mean.get_xdata(), raw.get_xdata())
    np.testing.assert_allclose(mean.get_ydata()[20:-20], 1.5)
    assert mean.get_ydata()[0] == pytest.approx(1.5, abs=0.1)  # not pulled towards 0


def test_the_panels_show_the_files_numbers():
    evaluations = [full_evaluation(step) for step in (0, 5, 10)]
    made = picture.figure(three_phases(10), evaluations).axes[1:]
    assert {panel.get_title(): series(panel) for panel in made} == {
        "distance to the teacher": {
            "forward KL, teacher's text": of(evaluations, "teacher_text/forward_kl"),
            "reverse KL, teacher's text": of(evaluations, "teacher_text/reverse_kl"),
            "forward KL, student's text": of(evaluations, "student_text/forward_kl"),
            "reverse KL, student's text": of(evaluations, "student_text/reverse_kl"),
        },
        "agreement with the teacher": {
            "top-1 agreement, teacher's text": of(evaluations, "teacher_text/top1_agreement"),
            "acceptance, teacher's text": of(evaluations, "teacher_text/acceptance_rate"),
            "top-1 agreement, student's text": of(evaluations, "student_text/top1_agreement"),
            "acceptance, student's text": of(evaluations, "student_text/acceptance_rate"),
        },
        "right answers": {"accuracy": of(evaluations, "accuracy")},
        "validation": {
            "loss": of(evaluations, "validation/loss"),
            "forward KL": of(evaluations, "validation/forward_kl"),
            "reverse KL": of(evaluations, "validation/reverse_kl"),
        },
        "perplexity": {
            "perplexity, teacher's text": of(evaluations, "teacher_text/perplexity"),
            "perplexity, student's text": of(evaluations, "student_text/perplexity"),
            "perplexity, validation": of(evaluations, "validation/perplexity"),
        },
        "side effects": {
            "forward KL": of(evaluations, "side_effects/forward_kl"),
            "reverse KL": of(evaluations, "side_effects/reverse_kl"),
        },
    }
    for panel in (made[1], made[2]):
        low, high = panel.get_ylim()
        assert -0.1 < low < 0 and 1 < high < 1.1


def test_what_was_not_measured_is_not_drawn():
    lines = [evaluation(0, texts=("teacher_text",)), evaluation(3)]
    _, divergence, *others = picture.figure([metric(0, 1.0)], lines).axes
    assert series(divergence)["forward KL, student's text"][0] == [3]
    assert [panel.get_title() for panel in others] == ["agreement with the teacher", "perplexity"]
    _, divergence, *_ = picture.figure([metric(0, 1.0)], lines[:1]).axes
    assert not [label for label in series(divergence) if "student" in label]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_what_is_no_number_is_not_drawn(bad):
    lines = [{"step": step, "teacher_text/perplexity": 2.0 + step} for step in (0, 1)]
    lines.append({"step": 2, "teacher_text/perplexity": bad})
    panel = picture.figure([metric(0, 1.0)], lines).axes[-1]
    assert series(panel) == {"perplexity, teacher's text": ([0, 1], [2.0, 3.0])}


@pytest.mark.parametrize("steps", [6, 300])
def test_no_two_lines_of_a_panel_look_alike_without_colour(steps):
    evaluations = [full_evaluation(step) for step in (0, 5)]
    panels = picture.figure(three_phases(steps), evaluations).axes
    assert [len(panel.lines) > 1 for panel in panels].count(False) == 1  # accuracy is alone
    for panel in panels:
        dashes = [(li.get_linestyle(), li.get_marker()) for li in panel.lines]
        assert len(set(dashes)) == len(dashes)
        # A line of one point has no dashes.
        marked = [li for li in panel.lines if li.get_marker()]
        markers = [(li.get_marker(), li.get_fillstyle()) for li in marked]
        assert len(set(markers)) == len(markers)
        # A mean has no marker; its dashes are its own among the means.
        means = [li.get_linestyle() for li in panel.lines if not li.get_marker()]
        assert len(set(means)) == len(means)


def test_every_line_is_dark_enough_on_white_and_named_in_the_legend():
    evaluations = [full_evaluation(step) for step in (0, 5)]
    for panel in picture.figure(three_phases(300), evaluations).axes:
        for line in panel.lines:
            grey = np.dot(matplotlib.colors.to_rgb(line.get_color()), [0.299, 0.587, 0.114])
            assert 1 - (line.get_alpha() or 1.0) * (1 - grey) < 0.7
        named = [text.get_text() for text in panel.get_legend().get_texts()]
        assert named == list(series(panel))


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
    training, divergence = picture.figure(metrics, evaluations).axes
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
    pixels = imread(path)
    assert (pixels[..., :3].min(-1) < 0.5).sum() > 1000  # something is drawn on the white
    assert list(tmp_path.glob("*.part")) == []


def test_the_steps_axis_shows_whole_steps_from_0():
    for metrics in ([metric(0, 1.0)], three_phases(40)):
        panel = picture.figure(metrics, []).axes[-1]
        low, high = panel.get_xlim()
        assert low < 0 <= metrics[-1]["step"] < high
        ticks = panel.get_xticks()
        np.testing.assert_array_equal(ticks, np.round(ticks))


def test_the_same_files_give_the_same_picture_and_others_another(tmp_path):
    write(tmp_path, three_phases(60), [evaluation(0), evaluation(60)])
    first = report.draw(tmp_path).read_bytes()
    assert report.draw(tmp_path).read_bytes() == first
    write(tmp_path, three_phases(60), [evaluation(0), evaluation(59)])
    assert report.draw(tmp_path).read_bytes() != first


def test_a_picture_cut_short_leaves_the_old_one(tmp_path, monkeypatch):
    write(tmp_path, three_phases(6))
    old = report.draw(tmp_path).read_bytes()

    def fail(figure, path, **options):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space"):
        report.draw(tmp_path)
    assert (tmp_path / "report.png").read_bytes() == old


def test_a_file_that_is_cut_off_is_drawn_without_its_last_line(tmp_path):
    write(tmp_path, three_phases(6), [evaluation(0)])
    whole = report.draw(tmp_path).read_bytes()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert report.draw(tmp_path).read_bytes() == whole


def test_many_panels_stand_in_two_columns_over_the_same_steps():
    made = picture.figure(three_phases(10), [full_evaluation(step) for step in (0, 20)])
    width, height = made.get_size_inches()
    assert len(made.axes) == 7 and width > height
    assert len({panel.get_xlim() for panel in made.axes}) == 1
    assert made.axes[0].get_xlim()[1] > 20
    named = [panel.get_title() for panel in made.axes if panel.get_xlabel()]
    assert named == ["perplexity", "side effects"]  # the lowest of each column
    assert len(picture.figure(three_phases(10), []).axes) == 1


def test_a_line_of_very_many_steps_keeps_its_highest_and_lowest():
    steps = np.arange(50_000)
    values = 1.0 + np.sin(steps / 1e4) ** 2
    values[31_234], values[777] = 9.0, 0.1
    whole = curves.Series("loss", curves.Look("-", "o", curves.BLUE), steps, values)
    axes = Figure().add_subplot()
    curves.plot(axes, curves.Panel("loss", [whole], "nats", noisy=True))
    thin = axes.lines[0]
    drawn = dict(zip(*thin.get_data(), strict=True))
    assert len(drawn) <= 2000 and drawn[31_234] == 9.0 and drawn[777] == 0.1
    assert all(values[int(step)] == value for step, value in drawn.items())
    assert list(drawn) == sorted(drawn)


def test_names_are_no_formulas(tmp_path):
    write(tmp_path, [metric(0, 1.0, "$x^$\x00", **{"anchor_$a_b$_loss": 0.5})])
    report.draw(tmp_path)
    (panel,) = picture.figure([metric(0, 1.0, "$x^$")], []).axes
    assert [t.get_text() for t in panel.get_legend().get_texts()] == [r"off-policy, \$x^\$"]
