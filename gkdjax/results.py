"""What a run found: results.json, the table, and sample answers side by side."""

import importlib.metadata
import pathlib
import platform

from gkdjax.evaluation.evaluate import recovery
from gkdjax.losses import Agreement
from gkdjax.progress import table

CONDITIONS = ("base", "prompted_base", "prompted_teacher", "student")
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def collect(before: dict, on_the_way: list[dict], after: dict, rows: dict, training: dict) -> dict:
    """The content of results.json.

    Args:
      before: `Evaluation.before`.
      on_the_way: lines of eval.jsonl.
      after: `Evaluation.after`.
      rows: what became of the data's rows.
      training: steps, tokens, seconds and the last losses.
    """
    results = {name: before[name] for name in CONDITIONS if name in before}
    results |= {name: after[name] for name in CONDITIONS if name in after}
    results |= {name: after[name] for name in ("reprompted_student", "prefix_cost", "side_effects") if name in after}
    results["unavailable"] = before["unavailable"]
    if on_the_way:
        results["held_out"] = {"before": on_the_way[0], "after": on_the_way[-1]}
    if "student" in results and "accuracy" in results["student"]:
        exact = {name: results[name]["accuracy"] for name in CONDITIONS}
        results["recovery"] = recovery(exact["base"], exact["prompted_teacher"], exact["student"])
    abilities = {
        name: {"before": before["abilities"][name], "after": after["abilities"][name]}
        for name in before["abilities"]
    }
    if "other_prefixes" in abilities:
        results["other_prefixes"] = abilities.pop("other_prefixes")
    samples = before["samples"] | after["samples"]
    found = {"retention": abilities, "samples": samples, "rows": rows, **training}
    return results | found | {"versions": versions()}


def versions() -> dict[str, str]:
    """Of Python and the libraries that the numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), **found}


def render(results: dict, workdir: pathlib.Path) -> str:
    """The tables that are printed at the end."""
    parts = [_rows_table(results["rows"])]
    if "student" in results:
        measures = {"accuracy": ("accuracy", "{:.1%}")}
        measures |= {"forward_kl": ("KL to prompted teacher", "{:.4f}")}
        shown = [name for name in measures if name in results["student"]]
        header = ["held-out prompts", *(measures[name][0] for name in shown)]
        rows = [
            [who, *(measures[name][1].format(results[who][name]) for name in shown)]
            for who in CONDITIONS
        ]
        parts.append(table(header, rows))
    if "recovery" in results:
        share = results["recovery"]
        said = "not defined: the prefix changes nothing" if share is None else f"{share:.3f}"
        parts.append(f"recovery of the prefix: {said}")
    if "held_out" in results:
        parts.append(_held_out_table(**results["held_out"]))
    kept = dict(results["retention"])
    if "other_prefixes" in results:
        kept["other prefixes"] = results["other_prefixes"]
    if kept:
        rows = [
            [name, f"{v['before']:.1%}", f"{v['after']:.1%}", f"{v['after'] - v['before']:+.1%}"]
            for name, v in kept.items()
        ]
        parts.append(table(["kept abilities", "before", "after", "change"], rows))
    if "teacher" in results:
        parts.append(_teacher_line(results["teacher"]))
    samples = results["samples"]
    parts.append(table(list(samples), list(zip(*samples.values(), strict=True))))
    parts.append(
        f"{results['steps']} steps, {results['tokens']} tokens, {results['seconds']:.0f} s;"
        f" last loss {results['loss']:.4f}\n{workdir}: "
        + ", ".join(["results.json", "metrics.jsonl", "report.png", *results["exports"]])
    )
    return "\n\n".join(parts)


def _rows_table(rows: dict[str, dict]) -> str:
    """What became of the rows of each stream."""
    lines = []
    for name, of in rows.items():
        fates = {fate: len(names) for fate, names in of.items() if isinstance(names, list)}
        told = ", ".join(f"{count} {fate}" for fate, count in fates.items() if count)
        counts = str(of["rows"]), told or "-", str(of["refused_responses"])
        views = [of["padding"][whose] for whose in ("student", "teacher") if of["padding"]]
        lines.append([name, *counts, ", ".join(f"{share:.0%}" for share in views) or "-"])
    header = ["rows", "trained", "lost or cut", "refused responses", "padding of the views"]
    return table(header, lines)


def _teacher_line(counts: dict[str, int]) -> str:
    """What a teacher at a server was asked, see `teachers.http.pool.Pool.report`."""
    c = {name: f"{count:,}" for name, count in counts.items()}
    return (
        f"teacher: {c['asked']} requests, {c['stored']} answered by the store, {c['bought']} by the"
        f" server ({c['read_tokens']} tokens read, {c['written_tokens']} written, {c['retries']}"
        f" retries); without an id here: {c['unmapped']} of the best tokens, {c['lost']} responses"
    )


def _held_out_table(before: dict, after: dict) -> str:
    """Distance to the teacher on its own text and on the student's, before and after."""
    texts = {"teacher_text": "teacher's text", "student_text": "student's text"}
    # The student's is missing where the teacher cannot read it.
    texts = {
        text: name for text, name in texts.items() if f"{text}/forward_kl" in before.keys() & after
    }
    rows = []
    for field in Agreement._fields:
        cells = [f"{line[f'{text}/{field}']:.4f}" for text in texts for line in (before, after)]
        rows.append([field.replace("_", " "), *cells])
    header = [f"{name}, {when}" for name in texts.values() for when in ("before", "after")]
    return table(["means over held-out tokens", *header], rows)
