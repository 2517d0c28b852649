"""The curves of a run, which can be read without colour: report.png, and the drawings of the page.

The lines of a panel differ in dashes and in markers, also where a line has one point only.
"""

import io
import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gkdjax.report.run_files import read_lines
from gkdjax.utils.files import replacing
from gkdjax.utils.text import visible

BLUE, ORANGE, BLACK = "#1b4f72", "#c25a00", "#000000"
_FEWEST_TO_SMOOTH = 30  # points; fewer can be followed one by one
_MARKERS, _FEW_MARKERS = 60, 12  # on a line, at most; on each of many lines over one another
_MOST_POINTS = 2000  # of a line; more are not seen, and would make the page large
_ONE_COLUMN = 3  # panels; more of them are in two columns
_PANEL = (10, 3.5)  # inches, with its legend beside it
_SVG_WIDTH = 3.5  # inches: on a phone 360 px wide the text is as large as the page's
_SVG_STYLE = {"svg.fonttype": "none", "font.size": 9, "axes.linewidth": 0.6, "legend.fontsize": 9}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Look(NamedTuple):
    """How a line is drawn."""

    dashes: str
    marker: str
    color: str
    fill: str = "full"  # or "none": a hollow marker


class Series(NamedTuple):
    """A line and its name."""

    label: str
    look: Look
    steps: np.ndarray
    values: np.ndarray


class Panel(NamedTuple):
    """Lines that are drawn over one another."""

    title: str
    series: Sequence[Series]
    unit: str = "nats a token"
    scale: str = "log"  # or "share": from 0 to 1
    noisy: bool = False  # a value a step, whose moving mean is drawn


_TEXTS = {"teacher_text": ("teacher's text", "o", BLUE)}
_TEXTS |= {"student_text": ("student's text", "s", ORANGE)}
_VALIDATION = {"validation": ("validation", "^", BLACK)}
_SIDE_EFFECTS = {"side_effects": ("unrelated prompts", "o", BLUE)}
_DIVERGENCES = {
    "forward_kl": ("forward KL", "-", "full"),
    "reverse_kl": ("reverse KL", "--", "none"),
}
_AGREEMENTS = {"top1_agreement": ("top-1 agreement", "-", "full")}
_AGREEMENTS |= {"acceptance_rate": ("acceptance", "--", "none")}
_PERPLEXITY = {"perplexity": ("perplexity", "-", "full")}
# Off-policy steps have two divergences at most: the warm-up's and the one after it.
_OFF_POLICY, _ON_POLICY = (Look("-", "o", BLUE), Look(":", "v", BLUE)), Look("-.", "x", ORANGE)
_ANCHORS = tuple(Look("--", marker, BLACK) for marker in "+*1234")


def draw(workdir: pathlib.Path, path: pathlib.Path | None = None) -> pathlib.Path:
    """Draws metrics.jsonl and, if there is one, eval.jsonl of a run, which may be going on.

    Args:
      path: None means workdir/report.png.

    Returns:
      The picture's path; it is replaced as a whole.
    """
    lines = (read_lines(workdir / name, []) for name in ("metrics.jsonl", "eval.jsonl"))
    return save(figure(panels(*lines)), path or workdir / "report.png")


def panels(metrics: Sequence[dict], evaluations: Sequence[dict]) -> list[Panel]:
    """The training loss, and what else the lines hold.

    Args:
      metrics: lines of metrics.jsonl; the loss of "step" n is the student's after n steps.
      evaluations: lines of eval.jsonl; "step" counts the steps done.
    """

    def measured(texts: dict, measures: dict) -> Iterator[Series]:
        for text, (text_label, marker, color) in texts.items():
            for name, (label, dashes, fill) in measures.items():
                label = label if len(texts) == 1 else f"{label}, {text_label}"
                yield from one(f"{text}/{name}", label, Look(dashes, marker, color, fill))

    def one(key: str, label: str, look: Look) -> list[Series]:
        series = Series(label, look, *points(evaluations, key))
        return [series] if len(series.steps) else []

    validation = one("validation/loss", "loss", Look("-.", "P", BLACK))
    validation += measured(_VALIDATION, _DIVERGENCES)
    accuracy = one("accuracy", "accuracy", Look("-", "D", BLACK))
    perplexity = [*measured(_TEXTS | _VALIDATION, _PERPLEXITY)]
    agreements = [*measured(_TEXTS, _AGREEMENTS)]
    made = [
        Panel("distance to the teacher", [*measured(_TEXTS, _DIVERGENCES)]),
        Panel("agreement with the teacher", agreements, "share", "share"),
        Panel("right answers", accuracy, "share", "share"),
        Panel("validation", validation),
        Panel("perplexity", perplexity, "a token"),
        Panel("side effects", [*measured(_SIDE_EFFECTS, _DIVERGENCES)]),
    ]
    loss = Panel("training loss", [*_losses(metrics)], noisy=True)
    return [loss, *(panel for panel in made if panel.series)]


def _losses(metrics: Sequence[dict]) -> Iterator[Series]:
    """One a divergence and writer of the text: losses of different kinds are not comparable."""
    kinds: dict[tuple[bool, str], list[dict]] = {}
    for line in metrics:
        kinds.setdefault((line["on_policy_rows"] > 0, line["divergence"]), []).append(line)
    off_policy = iter(_OFF_POLICY)
    for (on_policy, divergence), lines in kinds.items():
        look = _ON_POLICY if on_policy else next(off_policy)
        label = f"{'on' if on_policy else 'off'}-policy, {divergence}"
        yield Series(label, look, *points(lines, "loss"))
    anchors = [key for key in (metrics[0] if metrics else ()) if key.startswith("anchor")]
    for key, look in zip(anchors, itertools.cycle(_ANCHORS), strict=False):
        label = key.removesuffix("_loss").replace("_", " ", 1)
        yield Series(label, look, *points(metrics, key))


def points(lines: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """-> (steps, values) of the lines that have the key and a finite number there."""
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    steps, values = np.asarray(found, float).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def figure(shown: Sequence[Panel], size: tuple[float, float] = _PANEL, many_runs=False) -> Figure:
    """One column of panels, or two, over the same steps.

    Args:
      shown: at least one.
      size: of a panel, in inches.
      many_runs: the lines are runs: of noisy ones the moving mean alone, and no legends.
    """
    columns = 1 if len(shown) <= _ONE_COLUMN else 2
    lines = -(-len(shown) // columns)
    made = Figure(figsize=(columns * size[0], lines * size[1]), layout="constrained")
    ends = [series.steps[-1] for panel in shown for series in panel.series if len(series.steps)]
    last = max([1.0, *ends])
    for place, panel in enumerate(shown):
        axes = made.add_subplot(lines, columns, place + 1)
        axes.set_title(panel.title)
        axes.set_xlim(-0.02 * last, 1.02 * last)
        handles = _plot(axes, panel, many_runs)
        if not many_runs:  # beside the panel it hides nothing
            legend = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False}
            axes.legend(handles.values(), handles, handlelength=4, **legend)
        if place >= len(shown) - columns:
            axes.set_xlabel("optimizer steps done")
    return made


def svg(panel: Panel) -> str:
    """Draws a panel without its title, for the page; its ids begin with a hash of the title."""
    with matplotlib.rc_context(_SVG_STYLE | {"svg.hashsalt": panel.title}):
        height = 2.1 + 0.19 * len(panel.series)
        made = Figure(figsize=(_SVG_WIDTH, height), layout="constrained")
        axes = made.add_subplot()
        handles = _plot(axes, panel, False)
        legend = {"loc": "outside lower left", "frameon": False, "handlelength": 3.5}
        legend |= {"borderaxespad": 0.2, "labelspacing": 0.2}
        made.legend(list(handles.values()), list(handles), **legend)
        axes.set_xlabel("optimizer steps done")
        text = io.StringIO()
        made.savefig(text, format="svg", metadata=_NO_METADATA)
    return text.getvalue()


def save(made: Figure, path: pathlib.Path) -> pathlib.Path:
    """Writes a PNG, whole or not at all."""
    with replacing(path) as part:
        made.savefig(part, format="png", dpi=120)
    return path


def literal(text: str) -> str:
    """Escapes text for matplotlib: a dollar begins a formula, and a leading _ hides a name."""
    text = visible(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _plot(axes: Axes, panel: Panel, many_runs: bool) -> dict:
    """Draws all lines -> what a legend shows for each, by label."""
    handles = {}
    for series in panel.series:
        smooth = panel.noisy and len(series.steps) >= _FEWEST_TO_SMOOTH
        mean = series._replace(values=_moving_mean(series.values)) if smooth else series
        if many_runs:
            _line(axes, mean, _FEW_MARKERS)
        elif smooth:  # every step thin, under its thick mean
            thin = _line(axes, series, linewidth=0.7, markersize=4, alpha=0.6)
            look = series.look._replace(marker="")
            thick = _line(axes, mean._replace(look=look), linewidth=2.5)
            handles[literal(series.label)] = thick, thin  # in a legend the markers are on top
        else:
            handles[literal(series.label)] = _line(axes, series)
    axes.set_ylabel(panel.unit)
    axes.grid(color="0.9")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins="auto", steps=[1, 2, 5, 10]))
    if panel.scale == "share":
        axes.set_ylim(-0.03, 1.03)
    else:
        _log_scale(axes)
    return handles


def _line(axes: Axes, series: Series, markers: int = _MARKERS, **options):
    label, (dashes, marker, color, fill), steps, values = series
    if len(steps) > _MOST_POINTS:  # a dense line looks like the ends of its stretches
        stretches = np.array_split(np.arange(len(steps)), _MOST_POINTS // 2)
        ends = {s[pick(values[s])] for s in stretches for pick in (np.argmin, np.argmax)}
        shown = np.sort([*ends])
        steps, values = steps[shown], values[shown]
    style = {"linestyle": dashes, "marker": marker, "color": color, "fillstyle": fill}
    style["markevery"] = max(1, -(-len(steps) // markers))
    (line,) = axes.plot(steps, values, label=literal(label), **style | options)
    return line


def _moving_mean(values: np.ndarray) -> np.ndarray:
    """The mean of a fifteenth of all values around each; at the ends, of those that there are."""
    ones = np.ones(len(values) // 15)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _log_scale(axes: Axes) -> None:
    """Logarithmic where values differ by a factor of 10 or more.

    It is straight around 0 where rounding has left a divergence at 0 or below.
    """
    values = np.concatenate([line.get_ydata() for line in axes.lines] or [np.zeros(0)])
    highest = values.max(initial=0.0)
    if highest > 0 and values.min() > 0:
        axes.set_yscale("log" if highest >= 10 * values.min() else "linear")
    elif highest > 0:
        axes.set_yscale("symlog", linthresh=10.0 ** round(math.log10(highest) - 5))
