"""Prints runs side by side, and draws their curves over each other.

    python -m gkdjax.tools.compare RUN [RUN...] [--out=DIR or FILE.png]

Only runs that were asked the same can be compared. A measure that a run does not have is "-"; runs
may be unfinished. The picture is compare.png unless --out says otherwise.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gkdjax.report import curves, picture, run_files, settings
from gkdjax.report.curves import BLACK, BLUE, ORANGE, Look, Panel, Series
from gkdjax.report.run_files import RunFiles
from gkdjax.report.tables import NOTHING, Table, cells, tables
from gkdjax.report.terminal import as_text
from gkdjax.utils.errors import GkdjaxError, UserError
from gkdjax.utils.text import visible

_NAME = "compare.png"
_PANEL = (6, 3.2)  # inches
_MARKERS, _DASHES = "osD^vPX", ("-", "--", "-.", ":")
_COLORS = BLUE, ORANGE, BLACK
# What is measured alike in every run, by the key of its lines.
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
      UserError: a directory is no run's or is named twice, or the runs were asked different things.
    """
    paths = [directory.resolve() for directory in directories]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise UserError(f"{directories[place]} is named twice; name other runs")
    runs = dict(zip(_names(paths), map(run_files.read, directories), strict=True))
    _require_same_task(runs)
    return runs


def side_by_side(runs: dict[str, RunFiles]) -> list[Table]:
    """A table a subject: its rows are measures, its columns the runs."""
    names = [f"{visible(name)}{' *' if run.missing else ''}" for name, run in runs.items()]
    found = [dict(cells(tables(run.found))) for run in runs.values()]
    labels = dict.fromkeys(label for of in found for label in of)  # in order, each once
    note = "* not finished" if any(run.missing for run in runs.values()) else ""
    made = [
        Table("Runs", ("", *names), [("state", *(run.state for run in runs.values()))], note),
        Table("Config, where it differs", ("key", *names), _differing_keys(runs)),
    ]
    for title in dict.fromkeys(title for title, _ in labels):
        rows = [
            (label[1], *(of.get(label) or NOTHING for of in found))
            for label in labels
            if label[0] == title
        ]
        made.append(Table(title, ("", *names), rows))
    return [table for table in made if table.rows]


def figure(runs: dict[str, RunFiles]) -> Figure:
    """The runs' curves over each other, each run with its own dashes and marker."""
    looks = {name: _look(place) for place, name in enumerate(runs)}
    loss = Panel(_loss_title(runs), _series(runs, looks, "metrics", "loss"), "nats a token")
    shown = [loss._replace(noisy=True)]
    for key, (title, unit, scale) in _CURVES.items():
        shown.append(Panel(title, _series(runs, looks, "evaluations", key), unit, scale))
    shown = [loss for loss in shown if loss.series] or shown[:1]
    made = picture.grid(shown, curves.plot_means, _PANEL)
    handles = [_sample(look) for look in looks.values()]
    told = [curves.literal(f"{name} ({run.state})") for name, run in runs.items()]
    made.legend(handles, told, loc="outside upper left", handlelength=5, frameon=False)
    return made


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """The last part of each path, or as many as it takes."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len({*names}) == len(names):
            break
    return names


def _require_same_task(runs: dict[str, RunFiles]) -> None:
    asked = {name: _asked(run.found.get("task") or {}) for name, run in runs.items()}
    told = []
    for part in dict.fromkeys(part for of in asked.values() for part in of):
        groups: dict[str, list[str]] = {}
        for name, of in asked.items():
            if part in of:
                groups.setdefault(of[part], []).append(visible(name))
        if len(groups) > 1:
            told.append(f"{part} ({' / '.join(', '.join(names) for names in groups.values())})")
    if told:
        raise UserError(
            f"the runs were not asked the same: they differ in {'; '.join(told)}. Compare runs with"
            " the same questions, prompts and prefix"
        )


def _asked(task: dict) -> dict[str, str]:
    """What each measure was taken on, also where it falls back on other rows of the config."""
    found = {name: repr(rows) for name, rows in task.items()}
    if "questions" in found:
        found.setdefault("prompts", found["questions"])
    kept = sorted(f"{name} {rows}" for name, rows in found.items() if name.startswith("retention."))
    if kept:
        found.setdefault("side_effects", " ".join(kept))
    return found


def _differing_keys(runs: dict[str, RunFiles]) -> list[tuple[str, ...]]:
    configs = [settings.flat(run.config) for run in runs.values()]
    keys = dict.fromkeys(key for config in configs for key in config)
    lines = [(visible(key), *(config.get(key) or NOTHING for config in configs)) for key in keys]
    return [line for line in lines if len({*line[1:]}) > 1]


def _look(place: int) -> Look:
    """No two alike among the first 28; the colours only help."""
    marker, dashes = (of[place % len(of)] for of in (_MARKERS, _DASHES))
    return Look(dashes, marker, _COLORS[place % len(_COLORS)])


def _series(runs: dict[str, RunFiles], looks: dict[str, Look], lines: str, key: str):
    made = [
        Series(name, looks[name], *curves.points(getattr(run, lines), key))
        for name, run in runs.items()
    ]
    return [series for series in made if len(series.steps)]


def _loss_title(runs: dict[str, RunFiles]) -> str:
    kinds = {line["divergence"] for run in runs.values() for line in run.metrics}
    what = f", {kinds.pop()}" if len(kinds) == 1 else " (of several divergences)"
    return f"training loss{what}"


def _sample(look: Look) -> Line2D:
    return Line2D([], [], linestyle=look.dashes, marker=look.marker, color=look.color)


def _picture_path(out: pathlib.Path) -> pathlib.Path:
    """The file that --out means; its directory is made."""
    if out.suffix == ".png":
        path = out
    elif out.suffix and not out.is_dir():
        raise UserError(f"--out={out}: name a directory, or a file that ends in .png")
    else:
        path = out / _NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def main(argv: list[str] | None = None) -> int:
    """The command -> exit code."""
    parser = argparse.ArgumentParser("compare", description=__doc__.splitlines()[0])
    path = pathlib.Path
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="A run's directory.")
    parser.add_argument(
        "--out", type=path, default=path(_NAME), help=f"A .png file, or a directory for {_NAME}."
    )
    given = parser.parse_args(argv)
    try:
        runs = read(given.runs)
        try:
            drawn = picture.save(figure(runs), _picture_path(given.out))
        except OSError as error:
            raise UserError(f"--out={given.out} cannot be written: {error}") from error
    except GkdjaxError as error:
        print(f"compare: {error}", file=sys.stderr)
        return error.exit_code
    print("\n\n".join(map(as_text, side_by_side(runs))), end="\n\n")
    for name, run in runs.items():
        for told in run.damaged:
            print(f"{visible(name)}: {told}")
    print(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
