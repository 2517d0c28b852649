"""The picture of a run: what is drawn is what the files say, and it can be read in grey."""

import json

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from gkdjax import report

KEYS = ("forward_kl", "reverse_kl", "teacher_top_k_mass", "student_top_k_mass")
KEYS += ("top1_agreement", "acceptance_rate")


def metric(step: int, loss: float, divergence="forward_kl", on_policy_rows=0, **more) -> dict:
    rest = {"targets": 8, "tokens": 20, "tokens_per_second": 3.5, "grad_norm": 1.0}
    own = {"divergence": divergence, "on_policy_rows": on_policy_rows, "learning_rate": 1e-3}
    return {"step": step, "loss": loss, **own, **rest, **more}


def three_phases(steps: int) -> list[dict]:
    """Off-policy under a warm-up's divergence, then off- and on-policy steps in turn; an anchor."""
    lines = []
    for i in range(steps):
        divergence = "forward_kl" if i < steps // 3 else "reverse_kl"
        on_policy = 8 * (divergence == "reverse_kl" and i % 2)
        lines.append(metric(i, 2.0 / (i + 1), divergence, on_policy, anchor_loss=0.01 * (i + 1)))
    return lines


def evaluation(step: int, texts=("teacher_text", "student_text"), **more) -> dict:
    """Every value differs, and falls from step to step."""
    named = [f"{text}/{key}" for text in texts for key in KEYS]
    return {"step": step} | {n: 0.9 / (1 + i + step) for i, n in enumerate(named)} | more


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
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (directory / f"{name}.jsonl").write_text(text)


@pytest.mark.parametrize("steps", [12, 300])
def test_each_kind_of_loss_is_a_series_of_its_own(steps):
    metrics = three_phases(steps)
    (panel,) = report.figure(metrics, []).axes
    warm, later = metrics[: steps // 3], metrics[steps // 3 :]
    assert series(panel) == {
        "off-policy, forward_kl": of(warm, "loss"),
        "off-policy, reverse_kl": of([m for m in later if not m["on_policy_rows"]], "loss"),
        "on-policy, reverse_kl": of([m for m in later if m["on_policy_rows"]], "loss"),
        "anchor": of(metrics, "anchor_loss"),
    }


def test_many_steps_have_a_thick_moving_mean():
    metrics = [metric(i, 1.0 + (i % 2)) for i in range(300)]
    (panel,) = report.figure(metrics, []).axes
    raw, mean = panel.lines
    assert mean.get_linewidth() > 3 * raw.get_linewidth()
    np.testing.assert_array_equal(mean.get_xdata(), raw.get_xdata())
    np.testing.assert_allclose(mean.get_ydata()[20:-20], 1.5)
    assert mean.get_ydata()[0] == pytest.approx(1.5, abs=0.1)  # not pulled towards 0


def test_held_out_panels_show_the_files_numbers():
    evaluations = [evaluation(step, exact_match=step / 10) for step in (0, 5, 10)]
    _, divergence, agreement = report.figure(three_phases(10), evaluations).axes
    assert series(divergence) == {
        "forward KL, teacher's text": of(evaluations, "teacher_text/forward_kl"),
        "reverse KL, teacher's text": of(evaluations, "teacher_text/reverse_kl"),
        "forward KL, student's text": of(evaluations, "student_text/forward_kl"),
        "reverse KL, student's text": of(evaluations, "student_text/reverse_kl"),
    }
    assert series(agreement) == {
        "exact match": of(evaluations, "exact_match"),
        "top-1 agreement, teacher's text": of(evaluations, "teacher_text/top1_agreement"),
        "acceptance, teacher's text": of(evaluations, "teacher_text/acceptance_rate"),
        "top-1 agreement, student's text": of(evaluations, "student_text/top1_agreement"),
        "acceptance, student's text": of(evaluations, "student_text/acceptance_rate"),
    }
    low, high = agreement.get_ylim()
    assert -0.1 < low < 0 and 1 < high < 1.1


def test_what_was_not_measured_is_not_drawn():
    lines = [evaluation(0, texts=("teacher_text",)), evaluation(3)]
    _, divergence, agreement = report.figure([metric(0, 1.0)], lines).axes
    assert series(divergence)["forward KL, student's text"][0] == [3]
    assert "exact match" not in series(agreement)
    _, divergence, _ = report.figure([metric(0, 1.0)], lines[:1]).axes
    assert not [label for label in series(divergence) if "student" in label]


@pytest.mark.parametrize("steps", [6, 300])
def test_no_two_lines_of_a_panel_look_alike_without_colour(steps):
    evaluations = [evaluation(step, exact_match=0.5) for step in (0, 5)]
    for panel in report.figure(three_phases(steps), evaluations).axes:
        dashes = [(li.get_linestyle(), li.get_marker()) for li in panel.lines]
        assert len(set(dashes)) == len(dashes) > 3
        # A line of one point has no dashes.
        marked = [li for li in panel.lines if li.get_marker()]
        markers = [(li.get_marker(), li.get_fillstyle()) for li in marked]
        assert len(set(markers)) == len(markers) > 3
        # A mean has no marker; its dashes are its own among the means.
        means = [li.get_linestyle() for li in panel.lines if not li.get_marker()]
        assert len(set(means)) == len(means)


def test_every_line_is_dark_enough_on_white_and_named_in_the_legend():
    evaluations = [evaluation(step, exact_match=0.5) for step in (0, 5)]
    for panel in report.figure(three_phases(300), evaluations).axes:
        for line in panel.lines:
            grey = np.dot(matplotlib.colors.to_rgb(line.get_color()), [0.299, 0.587, 0.114])
            assert 1 - (line.get_alpha() or 1.0) * (1 - grey) < 0.7
        named = [text.get_text() for text in panel.get_legend().get_texts()]
        assert named == list(series(panel))


@pytest.mark.parametrize(
    ("losses", "scale"),
    [([2.0, 0.1], "log"), ([2.0, 0.0], "symlog"), ([2.0, -1e-9], "symlog"), ([0.0], "linear")],
)
def test_the_scale_holds_zeros_and_rounding_below(losses, scale, tmp_path):
    metrics = [metric(i, loss) for i, loss in enumerate(losses)]
    evaluations = [{"step": i, "teacher_text/forward_kl": kl} for i, kl in enumerate(losses)]
    training, divergence, _ = report.figure(metrics, evaluations).axes
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
        panel = report.figure(metrics, []).axes[-1]
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
