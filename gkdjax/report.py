"""report.png: a run's losses, and its held-out distance to the teacher and agreement with it.

The lines of a panel differ in dashes and in markers, so that the picture can be read without
colour, also where a line has one point only.
"""

import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gkdjax.metrics import read_lines

_BLUE, _ORANGE, _BLACK = "#1b4f72", "#c25a00", "#000000"
_FEWEST_TO_SMOOTH = 30  # points; fewer can be followed one by one
_MOST_MARKERS = 60


class _Look(NamedTuple):
    dashes: str
    marker: str
    color: str
    fill: str = "full"  # or "none": a hollow marker


class _Series(NamedTuple):
    label: str
    look: _Look
    steps: np.ndarray
    values: np.ndarray


# Off-policy steps have two divergences at most: the warm-up's and the one after it.
_OFF_POLICY = (_Look("-", "o", _BLUE), _Look(":", "v", _BLUE))
_ON_POLICY = _Look("-.", "x", _ORANGE)
_ANCHORS = tuple(_Look("--", marker, _BLACK) for marker in "+*1234")

_TEXTS = {"teacher_text": ("teacher's text", "o", _BLUE)}
_TEXTS |= {"student_text": ("student's text", "s", _ORANGE)}
_DIVERGENCES = {"forward_kl": ("forward KL", "-", "full")}
_DIVERGENCES |= {"reverse_kl": ("reverse KL", "--", "none")}
_AGREEMENTS = {"top1_agreement": ("top-1 agreement", "-", "full")}
_AGREEMENTS |= {"acceptance_rate": ("acceptance", "--", "none")}
_EXACT_MATCH = _Look("-.", "D", _BLACK)


def draw(workdir: pathlib.Path) -> pathlib.Path:
    """Draws a run's metrics.jsonl and, where there is one, its eval.jsonl.

    Returns:
      workdir/report.png, replaced as a whole.
    """
    path = workdir / "report.png"
    part = path.with_name(path.name + ".part")
    lines = (read_lines(workdir / name) for name in ("metrics.jsonl", "eval.jsonl"))
    figure(*lines).savefig(part, format="png", dpi=120)
    part.replace(path)
    return path


def figure(metrics: Sequence[dict], evaluations: Sequence[dict]) -> Figure:
    """The picture: training loss and, if anything was evaluated, divergence and agreement.

    Args:
      metrics: lines of metrics.jsonl; the loss of "step" n is the student's after n steps.
      evaluations: lines of eval.jsonl; "step" counts the steps done.
    """
    count = 3 if evaluations else 1
    made = Figure(figsize=(10, 3.5 * count), layout="constrained")
    panels = made.subplots(count, sharex=True, squeeze=False)[:, 0]
    _draw_losses(panels[0], metrics)
    if evaluations:
        _draw_divergences(panels[1], evaluations)
        _draw_agreement(panels[2], evaluations)
    panels[-1].set_xlabel("optimizer steps done")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    last = max([1, *(line["step"] for line in (*metrics, *evaluations))])
    panels[-1].set_xlim(-0.02 * last, 1.02 * last)
    for panel in panels:
        panel.grid(color="0.9")
    return made


def _draw_losses(panel: Axes, metrics: Sequence[dict]) -> None:
    panel.set(title="training loss", ylabel="nats a token")
    handles = {s.label: _plot_noisy(panel, s) for s in _loss_series(metrics)}
    _add_legend(panel, handles)
    _log_scale(panel)


def _draw_divergences(panel: Axes, evaluations: Sequence[dict]) -> None:
    panel.set(title="held-out divergence from the teacher", ylabel="nats a token")
    series = _held_out_series(evaluations, _DIVERGENCES)
    _add_legend(panel, {s.label: _plot(panel, s) for s in series})
    _log_scale(panel)


def _draw_agreement(panel: Axes, evaluations: Sequence[dict]) -> None:
    panel.set(title="held-out agreement", ylabel="share", ylim=(-0.03, 1.03))
    exact = _Series("exact match", _EXACT_MATCH, *_points(evaluations, "exact_match"))
    series = [*([exact] if len(exact.steps) else []), *_held_out_series(evaluations, _AGREEMENTS)]
    _add_legend(panel, {s.label: _plot(panel, s) for s in series})


def _loss_series(metrics: Sequence[dict]) -> Iterator[_Series]:
    """One a divergence and author of the text: losses of different kinds are not comparable."""
    kinds: dict[tuple[bool, str], list[dict]] = {}
    for line in metrics:
        kinds.setdefault((line["on_policy_rows"] > 0, line["divergence"]), []).append(line)
    off_policy = iter(_OFF_POLICY)
    for (on_policy, divergence), lines in kinds.items():
        look = _ON_POLICY if on_policy else next(off_policy)
        label = f"{'on' if on_policy else 'off'}-policy, {divergence}"
        yield _Series(label, look, *_points(lines, "loss"))
    anchors = [key for key in (metrics[0] if metrics else ()) if key.startswith("anchor")]
    for key, look in zip(anchors, itertools.cycle(_ANCHORS), strict=False):
        label = key.removesuffix("_loss").replace("_", " ", 1)
        yield _Series(label, look, *_points(metrics, key))


def _held_out_series(evaluations: Sequence[dict], names: dict) -> Iterator[_Series]:
    for text, (text_label, marker, color) in _TEXTS.items():
        for name, (label, dashes, fill) in names.items():
            steps, values = _points(evaluations, f"{text}/{name}")
            if len(steps):
                look = _Look(dashes, marker, color, fill)
                yield _Series(f"{label}, {text_label}", look, steps, values)


def _points(lines: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have the key."""
    found = [(line["step"], line[key]) for line in lines if key in line]
    steps, values = np.asarray(found, float).reshape(-1, 2).T
    return steps, values


def _plot_noisy(panel: Axes, series: _Series) -> tuple:
    """Every step; where these are many, thin, under a thick line of their moving mean."""
    if len(series.steps) < _FEWEST_TO_SMOOTH:
        return (_plot(panel, series),)
    every = -(-len(series.steps) // _MOST_MARKERS)
    thin = _plot(panel, series, linewidth=0.7, markersize=4, alpha=0.6, markevery=every)
    mean = _moving_mean(series.values, len(series.values) // 15)
    look = series.look._replace(marker="")
    thick = _plot(panel, series._replace(look=look, values=mean), linewidth=2.5)
    return thick, thin  # in the legend, the markers come out on top


def _plot(panel: Axes, series: _Series, **options):
    dashes, marker, color, fill = series.look
    style = {"linestyle": dashes, "marker": marker, "color": color, "fillstyle": fill}
    (line,) = panel.plot(series.steps, series.values, label=series.label, **style | options)
    return line


def _moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Of up to `width` values around each; at the ends, of those that there are."""
    ones = np.ones(width)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _add_legend(panel: Axes, handles: dict) -> None:
    """Beside the panel, where it hides nothing."""
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False}
    panel.legend(list(handles.values()), list(handles), handlelength=4, **place)


def _log_scale(panel: Axes) -> None:
    """Logarithmic, but straight around 0 where rounding has left a divergence at 0 or below."""
    values = np.concatenate([line.get_ydata() for line in panel.lines] or [np.zeros(0)])
    highest = values.max(initial=0.0)
    if highest > 0 and values.min() > 0:
        panel.set_yscale("log")
    elif highest > 0:
        panel.set_yscale("symlog", linthresh=10.0 ** round(math.log10(highest) - 5))
