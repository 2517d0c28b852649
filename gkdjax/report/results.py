"""The content of results.json, and as much of it as an unfinished run has."""

import importlib.metadata
import platform
from collections.abc import Sequence

# Who answers, and what it reads before it answers.
CONDITIONS = {
    "base": ("student, untrained", "the student's view"),
    "prompted_base": ("student, untrained", "prefix and turns"),
    "prompted_teacher": ("teacher", "prefix and turns"),
    "student": ("student, trained", "the student's view"),
    "reprompted_student": ("student, trained", "prefix and turns"),
    "student_other_prefix": ("student, trained", "another prefix and turns"),
}
_RECOVERIES = {"recovery": "accuracy", "heldout_recovery": "heldout_accuracy"}
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def collect(
    before: dict, on_the_way: Sequence[dict], after: dict, rows: dict, training: dict
) -> dict:
    """-> the content of results.json.

    Args:
      before: `Evaluation.before`.
      on_the_way: lines of eval.jsonl.
      after: `Evaluation.after`.
      rows: what became of the data's rows.
      training: steps, tokens, seconds and the last losses.
    """
    results = so_far(before, on_the_way)
    results |= {name: after[name] for name in CONDITIONS if name in after}
    for name, measure in _RECOVERIES.items():
        conditions = [results.get(who) or {} for who in ("base", "prompted_teacher", "student")]
        if all(measure in condition for condition in conditions):
            results[name] = recovery(*(condition[measure] for condition in conditions))
    results["retention"] = {
        name: {"before": share, "after": after["abilities"][name]}
        for name, share in before["abilities"].items()
    }
    results |= {name: after[name] for name in ("side_effects", "prefix_cost") if name in after}
    results["samples"] = before["samples"] | after["samples"]
    return results | {"rows": rows, **training, "versions": versions()}


def so_far(before: dict, on_the_way: Sequence[dict]) -> dict:
    """-> what is known of a run whose trained student was not measured yet, by the same keys.

    Args:
      before: `Evaluation.before`, or {} if the base was not measured yet.
      on_the_way: the lines of eval.jsonl that there are.
    """
    known = ("task", *CONDITIONS, "counts", "unavailable", "samples")
    results = {name: before[name] for name in known if name in before}
    if on_the_way:
        results["held_out"] = {"before": on_the_way[0], "after": on_the_way[-1]}
    return results


def training(metrics: Sequence[dict]) -> dict:
    """Adds up the lines of metrics.jsonl; {} without any."""
    if not metrics:
        return {}
    return {
        "steps": metrics[-1]["step"] + 1,
        "tokens": sum(line["tokens"] for line in metrics),
        "on_policy_steps": sum(line["on_policy_rows"] > 0 for line in metrics),
        "compilations": sum(line["compilations"] for line in metrics),
        "loss": metrics[-1]["loss"],
    }


def recovery(base: float, prompted_teacher: float, student: float) -> float | None:
    """(student - base) / (prompted_teacher - base); None if the prefix changes nothing."""
    gap = prompted_teacher - base
    return None if gap == 0 else (student - base) / gap


def versions() -> dict[str, str]:
    """-> those of Python and of the libraries that the numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), **found}
