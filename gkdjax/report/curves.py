"""Curves over the steps of a run, drawn so that they can be read without colour.

The lines of a panel differ in dashes and in markers, also where a line has one point only.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from gkdjax.utils.text import visible

BLUE, ORANGE, BLACK = "#1b4f72", "#c25a00", "#000000"
_FEWEST_TO_SMOOTH = 30  # points; fewer can be followed one by one
_MARKERS = 60  # on a line, at most
_FEW_MARKERS = 12  # on each of many lines that lie over one another
_MOST_POINTS = 2000  # of a thin line; more are not seen, and would make the page large


class Look(NamedTuple):
    """Of a line."""

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
    """What is drawn over one another."""

    title: str
    series: Sequence[Series]
    unit: str  # of the values
    scale: str = "log"  # or "share": from 0 to 1
    noisy: bool = False  # a value a step, whose mean is to be seen


def points(lines: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have the key and a finite number there."""
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    steps, values = np.asarray(found, float).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def plot(axes: Axes, panel: Panel) -> dict:
    """Draws all series -> what stands for each in a legend, by label."""
    draw = _plot_noisy if panel.noisy else _plot
    handles = {literal(series.label): draw(axes, series) for series in panel.series}
    _finish(axes, panel)
    return handles


def plot_means(axes: Axes, panel: Panel) -> None:
    """As `plot`, for many runs: of a noisy panel with many points the moving mean alone."""
    for series in panel.series:
        shown = _thinned(_smoothed(series)) if panel.noisy else series
        _plot(axes, shown, markers=_FEW_MARKERS)
    _finish(axes, panel)


def _finish(axes: Axes, panel: Panel) -> None:
    axes.set_ylabel(panel.unit)
    axes.grid(color="0.9")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins="auto", steps=[1, 2, 5, 10]))
    if panel.scale == "share":
        axes.set_ylim(-0.03, 1.03)
    else:
        _log_scale(axes)


def last_step(panels: Sequence[Panel]) -> float:
    """Of all series, at least 1: so far the axis reaches."""
    ends = (series.steps[-1] for panel in panels for series in panel.series if len(series.steps))
    return max([1.0, *ends])


def literal(text: str) -> str:
    """For matplotlib, to which a dollar begins a formula and a leading _ hides a name."""
    text = visible(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _plot_noisy(axes: Axes, series: Series) -> tuple:
    """Every step; where these are many, thin, under a thick line of their moving mean."""
    if len(series.steps) < _FEWEST_TO_SMOOTH:
        return (_plot(axes, series),)
    seen = _thinned(series)
    thin = _plot(axes, seen, linewidth=0.7, markersize=4, alpha=0.6)
    mean = _thinned(_smoothed(series))
    look = series.look._replace(marker="")
    thick = _plot(axes, mean._replace(look=look), linewidth=2.5)
    return thick, thin  # in the legend, the markers come out on top


def _plot(axes: Axes, series: Series, markers: int = _MARKERS, **options):
    dashes, marker, color, fill = series.look
    style = {"linestyle": dashes, "marker": marker, "color": color, "fillstyle": fill}
    style |= {"markevery": max(1, -(-len(series.steps) // markers))}
    label = literal(series.label)
    (line,) = axes.plot(series.steps, series.values, label=label, **style | options)
    return line


def _smoothed(series: Series) -> Series:
    if len(series.steps) < _FEWEST_TO_SMOOTH:
        return series
    return series._replace(values=_moving_mean(series.values, len(series.values) // 15))


def _moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Of up to `width` values around each; at the ends, of those that there are."""
    ones = np.ones(width)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _thinned(series: Series) -> Series:
    """The lowest and the highest of each stretch of steps: what a dense line looks like."""
    if len(series.steps) <= _MOST_POINTS:
        return series
    stretches = np.array_split(np.arange(len(series.steps)), _MOST_POINTS // 2)
    ends = {s[pick(series.values[s])] for s in stretches for pick in (np.argmin, np.argmax)}
    kept = np.sort([*ends])
    return series._replace(steps=series.steps[kept], values=series.values[kept])


def _log_scale(axes: Axes) -> None:
    """Logarithmic where values differ by a factor of 10 or more.

    But straight around 0 where rounding has left a divergence at 0 or below.
    """
    values = np.concatenate([line.get_ydata() for line in axes.lines] or [np.zeros(0)])
    highest = values.max(initial=0.0)
    if highest > 0 and values.min() > 0:
        axes.set_yscale("log" if highest >= 10 * values.min() else "linear")
    elif highest > 0:
        axes.set_yscale("symlog", linthresh=10.0 ** round(math.log10(highest) - 5))
