"""report.html: all that there is to see of a run, in one file that asks nothing of a network.

The text of models and of data is hostile until shown otherwise: the template makes every word of it
visible and escapes it, and the page forbids itself all scripts.
"""

import io
import json
import pathlib
import re

import jinja2
import markupsafe
import matplotlib
from matplotlib.figure import Figure

from gkdjax.config import ASSETS
from gkdjax.report import answers, curves, panels, run_files, settings, tables
from gkdjax.report.curves import Panel
from gkdjax.report.run_files import RunFiles
from gkdjax.utils.files import write_text
from gkdjax.utils.text import cut, visible

_LONGEST = 1500  # characters of a text that is shown
_WIDTH = 3.5  # inches of a panel: its text is as large as the page's on a phone 360 px wide
_OF_SVG = {"svg.fonttype": "none", "font.size": 9, "axes.linewidth": 0.6, "legend.fontsize": 9}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def write_html(workdir: pathlib.Path, path: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the page of a run, of as much as there is of it.

    Args:
      workdir: of a run, which may be going on.
      path: None means workdir/report.html.

    Returns:
      The page's path; it is replaced as a whole. The same files give the same bytes.

    Raises:
      UserError: `workdir` is no run's.
    """
    path = path or workdir / "report.html"
    write_text(path, render(run_files.read(workdir)))
    return path


def render(run: RunFiles) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS / "report"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        finalize=_safe,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = lambda text: cut(text, _LONGEST)
    found = run.found
    samples = found.get("samples") or {}
    drawn = panels.panels(run.metrics, run.evaluations) if run.metrics or run.evaluations else []
    return environment.get_template("page.html.jinja").render(
        run=run,
        name=run.directory.resolve().name,
        headlines=_headlines(found),
        curves=[(panel.title, _svg(panel)) for panel in drawn],
        tables=tables.tables(found),
        samples=tables.side_by_side(samples),
        by_step=answers.by_step(run.samples, samples.get("question") or ()),
        answer_sets=answers.of_sets(run.answers),
        completions=run_files.excerpts(run.directory),
        chosen=settings.unlike_defaults(run.config),
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
        versions=found.get("versions") or {},
    )


def _safe(value):
    """What the template shows of a value, before it escapes it; drawings are safe already."""
    return value if isinstance(value, markupsafe.Markup) else visible(str(value))


def _headlines(found: dict) -> list[tuple[str, str, str]]:
    """(what, its value, a word on it) of what people look for first."""
    made = []
    for key, what in (("accuracy", "right answers"), ("forward_kl", "forward KL to the teacher")):
        form = tables.share if key == "accuracy" else tables.nats
        both = [(found.get(who) or {}).get(key) for who in ("base", "student")]
        if None not in both:
            teacher = (found.get("prompted_teacher") or {}).get(key)
            note = "" if teacher is None else f"prompted teacher {form(teacher)}"
            made.append((what, " \u2192 ".join(map(form, both)), note))
    if found.get("recovery") is not None:
        made.append(("recovery of the prefix", f"{found['recovery']:.3f}", "1 is all of it"))
    changes = {k: of["after"] - of["before"] for k, of in (found.get("retention") or {}).items()}
    if changes:
        worst = min(changes, key=changes.__getitem__)
        made.append(("kept abilities", f"{changes[worst]:+.1%}", f"the worst: {worst}"))
    if found.get("prefix_cost"):
        saved = found["prefix_cost"]["tokens_saved"]
        made.append(("tokens saved", f"{saved:,.1f}", "a prompt, on average"))
    return made


def _svg(panel: Panel) -> markupsafe.Markup:
    """The panel without its title, as wide as its place; its ids are its own on the page."""
    with matplotlib.rc_context(_OF_SVG | {"svg.hashsalt": panel.title}):
        height = 2.1 + 0.19 * len(panel.series)
        made = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = made.add_subplot()
        handles = curves.plot(axes, panel)
        place = {"loc": "outside lower left", "frameon": False, "handlelength": 3.5}
        place |= {"borderaxespad": 0.2, "labelspacing": 0.2}
        made.legend(list(handles.values()), list(handles), **place)
        axes.set_xlabel("optimizer steps done")
        text = io.StringIO()
        made.savefig(text, format="svg", metadata=_NO_METADATA)
    whole = text.getvalue()
    whole = whole[whole.index("<svg") :]
    # In a page, namespaces go without saying. Groups are numbered from 1 in every drawing, and
    # nothing points to them.
    head, body = whole.split(">", 1)
    head = re.sub(r' (xmlns(:xlink)?|width|height)="[^"]*"', "", head)
    return markupsafe.Markup(f"{head}>" + re.sub(r'<g id="[^"]*"', "<g", body))
