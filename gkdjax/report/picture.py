"""report.png: the curves of a run, all in one picture that can be read in grey."""

import pathlib
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gkdjax.report import curves, panels, run_files
from gkdjax.report.curves import Panel
from gkdjax.utils.files import replacing

_ONE_COLUMN = 3  # panels; more of them stand in two
_PANEL = (10, 3.5)  # inches, with its legend beside it


def draw(workdir: pathlib.Path, path: pathlib.Path | None = None) -> pathlib.Path:
    """Draws a run's metrics.jsonl and, where there is one, its eval.jsonl.

    Args:
      workdir: of a run, which may be going on.
      path: None means workdir/report.png.

    Returns:
      The picture's path; it is replaced as a whole.
    """
    lines = (run_files.read_lines(workdir / name)[0] for name in ("metrics.jsonl", "eval.jsonl"))
    return save(figure(*lines), path or workdir / "report.png")


def figure(metrics: Sequence[dict], evaluations: Sequence[dict]) -> Figure:
    """The picture, of the lines that `panels.panels` takes."""
    return grid(panels.panels(metrics, evaluations), _draw)


def grid(shown: Sequence[Panel], draw, panel_size: tuple[float, float] = _PANEL) -> Figure:
    """One column of panels, or two, over the same steps.

    Args:
      shown: at least one.
      draw: takes Axes and a Panel.
      panel_size: in inches.
    """
    columns = 1 if len(shown) <= _ONE_COLUMN else 2
    lines = -(-len(shown) // columns)
    made = Figure(figsize=(columns * panel_size[0], lines * panel_size[1]), layout="constrained")
    last = curves.last_step(shown)
    for place, panel in enumerate(shown):
        axes = made.add_subplot(lines, columns, place + 1)
        axes.set_title(panel.title)
        axes.set_xlim(-0.02 * last, 1.02 * last)
        draw(axes, panel)
        if place >= len(shown) - columns:
            axes.set_xlabel("optimizer steps done")
    return made


def save(made: Figure, path: pathlib.Path) -> pathlib.Path:
    """Writes a PNG."""
    with replacing(path) as part:
        made.savefig(part, format="png", dpi=120)
    return path


def _draw(axes: Axes, panel: Panel) -> None:
    """With a legend beside the panel, where it hides nothing."""
    handles = curves.plot(axes, panel)
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False}
    axes.legend(list(handles.values()), list(handles), handlelength=4, **place)
