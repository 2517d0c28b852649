"""What a run found: results.json, the table, and sample answers side by side."""

import importlib.metadata
import pathlib
import platform

from gkdjax.evaluate import recovery
from gkdjax.progress import table

CONDITIONS = ("base", "prompted_base", "prompted_teacher", "student")
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def collect(before: dict, after: dict, rows: dict, training: dict) -> dict:
    """The content of results.json.

    Args:
      before: `Evaluation.before`.
      after: `Evaluation.after`.
      rows: what became of the data's rows.
      training: steps, tokens, seconds and the last losses.
    """
    results = {name: before[name] for name in CONDITIONS if name in before}
    results |= {name: after[name] for name in CONDITIONS if name in after}
    if "student" in results:
        exact = {name: results[name]["exact_match"] for name in CONDITIONS}
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
    parts = []
    if "student" in results:
        rows = [
            [name, f"{results[name]['exact_match']:.1%}", f"{results[name]['forward_kl']:.4f}"]
            for name in CONDITIONS
        ]
        parts.append(table(["held-out questions", "exact match", "KL to prompted teacher"], rows))
        share = results["recovery"]
        said = "not defined: the prefix changes nothing" if share is None else f"{share:.3f}"
        parts.append(f"recovery of the prefix: {said}")
    kept = dict(results["retention"])
    if "other_prefixes" in results:
        kept["other prefixes"] = results["other_prefixes"]
    if kept:
        rows = [
            [name, f"{v['before']:.1%}", f"{v['after']:.1%}", f"{v['after'] - v['before']:+.1%}"]
            for name, v in kept.items()
        ]
        parts.append(table(["kept abilities", "before", "after", "change"], rows))
    samples = results["samples"]
    parts.append(table(list(samples), list(zip(*samples.values(), strict=True))))
    parts.append(
        f"{results['steps']} steps, {results['tokens']} tokens, {results['seconds']:.0f} s;"
        f" last loss {results['loss']:.4f}\n{workdir}: "
        + ", ".join(["results.json", "metrics.jsonl", *results["exports"]])
    )
    return "\n\n".join(parts)
