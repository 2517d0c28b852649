"""Prints runs side by side, and draws their curves over each other.

    python -m gkdjax.tools.compare RUN [RUN...] [--out=DIR or FILE.png]

Only runs with the same questions, prompts and prefix can be compared. "-" stands for a measure that
a run does not have; runs may be unfinished. The picture is compare.png unless --out says otherwise.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gkdjax import tools
from gkdjax.report import picture, run_files
from gkdjax.report.picture import BLACK, BLUE, ORANGE, Look, Panel, Series
from gkdjax.report.run_files import RunFiles
from gkdjax.report.tables import NOTHING, Table, cells, tables
from gkdjax.report.terminal import as_text
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import writing
from gkdjax.utils.text import visible

_NAME = "compare.png"
_PANEL = (6, 3.2)  # inches
_MARKERS, _DASHES, _COLORS = "osD^vPX", ("-", "--", "-.", ":"), (BLUE, ORANGE, BLACK)
# Measures that mean the same in every run, by the key of their lines -> title, unit, scale.
_CURVES = {
    "teacher_text/forward_kl": ("forward KL, teacher's text", "nats a token", "log"),
    "student_text/forward_kl": ("forward KL, student's text", "nats a token", "log"),
    "accuracy": ("right answers", "share", "share"),
    "teacher_text/perplexity": ("perplexity, teacher's text", "a token", "log"),
    "validation/loss": ("validation loss", "nats a token", "log"),
    "side_effects/forward_kl": ("side effects, forward KL", "nats a token", "log"),
}


def read(directories: Sequence[pathlib.Path]) -> dict[str, RunFiles]:
    """Name -> run; a name is as much of a path's end as tells the runs apart.

    Raises:
      UserError: a directory is no run's or is named twice, or the runs have different tasks.
    """
    paths = [directory.resolve() for directory in directories]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise UserError(f"{directories[place]} is named twice; name other runs")
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len({*names}) == len(names):
            break
    runs = dict(zip(names, map(run_files.read, directories), strict=True))
    _require_same_task(runs)
    return runs


def side_by_side(runs: dict[str, RunFiles]) -> list[Table]:
    """A table per subject: its rows are measures, its columns the runs."""
    names = [f"{visible(name)}{' *' if run.missing else ''}" for name, run in runs.items()]
    note = "* not finished" if any(run.missing for run in runs.values()) else ""
    configs = [run_files.flat(run.config) for run in runs.values()]
    keys = dict.fromkeys(key for config in configs for key in config)  # in order, each once
    lines = [(visible(key), *(config.get(key) or NOTHING for config in configs)) for key in keys]
    differing = [line for line in lines if len({*line[1:]}) > 1]
    made = [
        Table("Runs", ("", *names), [("state", *(run.state for run in runs.values()))], note),
        Table("Config, where it differs", ("key", *names), differing),
    ]
    found = [dict(cells(tables(run.found))) for run in runs.values()]
    labels = dict.fromkeys(label for measures in found for label in measures)
    for title in dict.fromkeys(title for title, _ in labels):
        rows = [
            (label[1], *(measures.get(label) or NOTHING for measures in found))
            for label in labels
            if label[0] == title
        ]
        made.append(Table(title, ("", *names), rows))
    return [table for table in made if table.rows]


def figure(runs: dict[str, RunFiles]) -> Figure:
    """The runs' curves over each other."""
    cycles = _DASHES, _MARKERS, _COLORS  # 28 runs look different, even without colour
    looks = {
        name: Look(*(cycle[place % len(cycle)] for cycle in cycles))
        for place, name in enumerate(runs)
    }

    def series(lines: str, key: str) -> list[Series]:
        made = [
            Series(name, looks[name], *picture.points(getattr(run, lines), key))
            for name, run in runs.items()
        ]
        return [one for one in made if len(one.steps)]

    kinds = {line["divergence"] for run in runs.values() for line in run.metrics}
    kind = f", {kinds.pop()}" if len(kinds) == 1 else " (of several divergences)"
    loss = Panel(f"training loss{kind}", series("metrics", "loss"), "nats a token", noisy=True)
    panels = [loss]
    for key, (title, unit, scale) in _CURVES.items():
        panels.append(Panel(title, series("evaluations", key), unit, scale))
    panels = [panel for panel in panels if panel.series] or [loss]
    made = picture.figure(panels, _PANEL, many_runs=True)
    handles = [
        Line2D([], [], linestyle=look.dashes, marker=look.marker, color=look.color)
        for look in looks.values()
    ]
    labels = [picture.literal(f"{name} ({run.state})") for name, run in runs.items()]
    made.legend(handles, labels, loc="outside upper left", handlelength=5, frameon=False)
    return made


def _require_same_task(runs: dict[str, RunFiles]) -> None:
    tasks = {name: _rows_of_measures(run.found.get("task") or {}) for name, run in runs.items()}
    differing = []
    for measure in dict.fromkeys(measure for task in tasks.values() for measure in task):
        groups: dict[str, list[str]] = {}
        for name, task in tasks.items():
            if measure in task:
                groups.setdefault(task[measure], []).append(visible(name))
        if len(groups) > 1:
            differing.append(f"{measure} ({' / '.join(map(', '.join, groups.values()))})")
    if differing:
        raise UserError(
            f"the runs were not asked the same: they differ in {'; '.join(differing)}. Compare runs"
            " with the same questions, prompts and prefix"
        )


def _rows_of_measures(task: dict) -> dict[str, str]:
    """The rows of each measure, also where it falls back on other rows of the config."""
    found = {name: repr(rows) for name, rows in task.items()}
    if "questions" in found:
        found.setdefault("prompts", found["questions"])
    kept = [f"{name} {rows}" for name, rows in found.items() if name.startswith("retention.")]
    if kept:
        found.setdefault("side_effects", " ".join(sorted(kept)))
    return found


def _compare(flags: argparse.Namespace) -> None:
    runs, out = read(flags.runs), flags.out
    if out.suffix and out.suffix != ".png" and not out.is_dir():
        raise UserError(f"--out={out}: name a directory, or a file that ends in .png")
    path = out if out.suffix == ".png" else out / _NAME
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(figure(runs), path)
    print("\n\n".join(map(as_text, side_by_side(runs))), end="\n\n")
    for name, run in runs.items():
        for damage in run.damaged:
            print(f"{visible(name)}: {damage}")
    print(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("compare", description=__doc__.splitlines()[0])
    path = pathlib.Path
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="A run's directory.")
    parser.add_argument(
        "--out", type=path, default=path(_NAME), help=f"A .png file, or a directory for {_NAME}."
    )
    return tools.run(parser, _compare, argv)


if __name__ == "__main__":
    sys.exit(main())
