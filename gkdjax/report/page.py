"""report.html: all of a run that can be shown, in one file that needs no network.

The text of models and of data may be hostile: the template makes every word of it visible and
escapes it, and the page forbids itself all scripts.
"""

import json
import pathlib
import re

import jinja2
import markupsafe

from gkdjax.config import ASSETS
from gkdjax.report import picture, run_files, tables
from gkdjax.report.run_files import RunFiles
from gkdjax.utils.files import write_text
from gkdjax.utils.text import cut, visible

_LONGEST = 1500  # characters of a text that is shown


def write_html(workdir: pathlib.Path, path: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the page of a run, which may be going on; the same files give the same bytes.

    Args:
      path: None means workdir/report.html.

    Returns:
      The page's path; it is replaced as a whole.

    Raises:
      UserError: `workdir` is no run's.
    """
    path = path or workdir / "report.html"
    write_text(path, _render(run_files.read(workdir)))
    return path


def _render(run: RunFiles) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS / "report"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        # Before escaping; drawings are safe already.
        finalize=lambda x: x if isinstance(x, markupsafe.Markup) else visible(str(x)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = lambda text: cut(text, _LONGEST)
    found = run.found
    samples = found.get("samples") or {}
    there = run.metrics or run.evaluations
    return environment.get_template("page.html.jinja").render(
        run=run,
        name=run.directory.resolve().name,
        headlines=_headlines(found),
        curves=_curves(run) if there else [],
        tables=tables.tables(found),
        samples=tables.side_by_side(samples),
        by_step=tables.by_step(run.samples, samples.get("question") or ()),
        answer_sets=tables.answer_sets(run.answers),
        completions=[*run_files.excerpts(run.directory)],
        chosen=run_files.unlike_defaults(run.config),
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
        versions=found.get("versions") or {},
    )


def _headlines(found: dict) -> list[tuple[str, str, str]]:
    """(what, its value, a note on it) of what people look for first."""
    made = []
    base, student, teacher = (
        found.get(who) or {} for who in ("base", "student", "prompted_teacher")
    )
    for key, label, form in (
        ("accuracy", "right answers", tables.share),
        ("forward_kl", "forward KL to the teacher", tables.nats),
    ):
        if base.get(key) is not None and student.get(key) is not None:
            best = teacher.get(key)
            note = "" if best is None else f"prompted teacher {form(best)}"
            made.append((label, f"{form(base[key])} \u2192 {form(student[key])}", note))
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


def _curves(run: RunFiles) -> list[tuple[str, markupsafe.Markup]]:
    """(title, <svg> element as wide as its place) of each panel."""
    made = []
    for panel in picture.panels(run.metrics, run.evaluations):
        _, _, rest = picture.svg(panel).partition("<svg")
        head, body = rest.split(">", 1)
        # A page needs no namespaces. Groups are numbered from 1 in every drawing, and nothing
        # points to them.
        head = re.sub(r' (xmlns(:xlink)?|width|height)="[^"]*"', "", head)
        body = re.sub(r'<g id="[^"]*"', "<g", body)
        made.append((panel.title, markupsafe.Markup(f"<svg{head}>{body}")))
    return made
