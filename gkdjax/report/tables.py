"""The tables of a run: the terminal, report.html and tools.compare show these and no others.

Each number is formatted here, once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from gkdjax.report.results import CONDITIONS
from gkdjax.utils.text import visible

NOTHING = "-"  # in a cell: not measured
_Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations


class Table(NamedTuple):
    """Cells are text already."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    labels: int = 1  # so many columns say what a row is; the others are measured
    prose: bool = False  # the last column holds sentences


class _Measure(NamedTuple):
    label: str
    form: Callable[[float], str]


nats = "{:.4f}".format
share = "{:.1%}".format
_fine_share = "{:.2%}".format
_factor = "{:,.2f}".format
_MEASURES = {
    "loss": _Measure("loss", nats),
    "forward_kl": _Measure("forward KL", nats),
    "reverse_kl": _Measure("reverse KL", nats),
    "teacher_top_k_mass": _Measure("teacher's top-k mass", _fine_share),
    "student_top_k_mass": _Measure("student's top-k mass", _fine_share),
    "top1_agreement": _Measure("top-1 agreement", _fine_share),
    "acceptance_rate": _Measure("acceptance rate", _fine_share),
    "perplexity": _Measure("perplexity", _factor),
}
_OF_CONDITIONS = ("forward_kl", "reverse_kl", "top1_agreement", "acceptance_rate", "perplexity")


def tables(results: dict) -> list[Table]:
    """All that there is something for.

    Args:
      results: the content of results.json, or `results.so_far`.
    """
    makers = (_answers, _recovery, _distances, _texts, _validation, _kept, _side_effects)
    makers += (_prefix_cost, _unavailable, _training, _rows, _server)
    return [table for table in (maker(results) for maker in makers) if table.rows]


def side_by_side(samples: dict[str, Sequence[str]]) -> list[Table]:
    """A table for each question that was shown, with a row for each condition's answer.

    Args:
      samples: `results["samples"]`.
    """
    found = []
    for place, question in enumerate(samples.get("question") or ()):
        rows = [
            (plain(who), visible(samples[who][place]))
            for who in CONDITIONS
            if who in samples and place < len(samples[who])
        ]
        found.append(Table(visible(question), ("who", "answer"), rows, prose=True))
    return found


def plain(name: str) -> str:
    """A name of the files, as "prompted_base", in words."""
    return name.replace("_", " ")


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95 % interval (Wilson 1927) of a share `right` of `count` answers."""
    z2 = _Z * _Z / count
    middle = (right + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(right * (1 - right) / count + z2 / 4 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def counted_share(right: float, count: int | None) -> str:
    """ "83.2% [80.8, 85.4]": with its interval, where it is known of how many."""
    if not count:
        return share(right)
    low, high = wilson(right, count)
    return f"{share(right)} [{100 * low:.1f}, {100 * high:.1f}]"


def measured(name: str, values: dict, key: str = "") -> str:
    """A cell: `values[key or name]` as measures of this name are written."""
    key = key or name
    return _MEASURES[name].form(values[key]) if values.get(key) is not None else NOTHING


def _training(results: dict) -> Table:
    forms = {"steps": "{:,}", "tokens": "{:,}", "on_policy_steps": "{:,}", "compilations": "{:,}"}
    forms |= {"loss": "{:.4f}", "seconds": "{:,.0f}"}
    names = {"loss": "last loss", "on_policy_steps": "on-policy steps"}
    rows = [
        (names.get(key) or plain(key), form.format(results[key]))
        for key, form in forms.items()
        if key in results
    ]
    return Table("Training", ("", "value"), rows)


def _rows(results: dict) -> Table:
    """What became of the rows of each stream."""
    rows = []
    for name, of in (results.get("rows") or {}).items():
        fates = {fate: len(names) for fate, names in of.items() if isinstance(names, list)}
        told = ", ".join(f"{count} {fate}" for fate, count in fates.items() if count)
        views = [of["padding"][whose] for whose in ("student", "teacher") if of["padding"]]
        padding = ", ".join(f"{each:.0%}" for each in views)
        counts = str(of["rows"]), told or NOTHING, str(of["refused_responses"])
        rows.append((plain(name), *counts, padding or NOTHING))
    header = ("rows of", "trained", "lost or cut", "refused responses", "padding of the views")
    return Table("Rows", header, rows)


def _answers(results: dict) -> Table:
    sets = {"accuracy": ("accuracy", "questions"), "heldout_accuracy": ("held-out", "heldout")}
    there = {name: results[name] for name in CONDITIONS if name in results}
    shown = [key for key in sets if any(key in each for each in there.values())]
    counts = results.get("counts") or {}
    rows = [
        (plain(name), *CONDITIONS[name], *(_right(each, key, counts, sets) for key in shown))
        for name, each in there.items()
    ]
    header = ("condition", "who answers", "what it reads", *(sets[key][0] for key in shown))
    note = "Share of right answers, with its 95 % interval (Wilson)"
    return Table("Right answers", header, rows if shown else [], note, labels=3)


def _right(condition: dict, key: str, counts: dict, sets: dict) -> str:
    if key not in condition:
        return NOTHING
    return counted_share(condition[key], counts.get(sets[key][1]))


def _distances(results: dict) -> Table:
    there = {name: results[name] for name in CONDITIONS if name in results}
    shown = [key for key in _OF_CONDITIONS if any(key in each for each in there.values())]
    rows = [
        (plain(name), *(measured(key, each) for key in shown))
        for name, each in there.items()
        if any(key in each for key in shown)
    ]
    header = ("condition", *(_MEASURES[key].label for key in shown))
    note = "Means over the tokens of the teacher's own answers; divergences in nats a token"
    return Table("Distance to the prompted teacher", header, rows, note)


def _recovery(results: dict) -> Table:
    rows = []
    for key, asked in (("recovery", "questions"), ("heldout_recovery", "held-out questions")):
        if key in results:
            of = results[key]
            rows.append((asked, "not defined" if of is None else f"{of:.3f}"))
    note = (
        "(student - base) / (prompted teacher - base); not defined where the prefix changes nothing"
    )
    return Table("Recovery of the prefix", ("", "recovery"), rows, note)


def _texts(results: dict) -> Table:
    texts = {"teacher_text": "teacher's text", "student_text": "student's text"}
    note = "Means over tokens; the teacher has read the prefix"
    return _before_after(results, "Before and after training", texts, note)


def _validation(results: dict) -> Table:
    note = "Rows that are not trained"
    return _before_after(results, "Validation", {"validation": "validation"}, note)


def _before_after(results: dict, title: str, texts: dict[str, str], note: str) -> Table:
    """The lines of eval.jsonl at both ends, for the texts that both of them have."""
    if "held_out" not in results:
        return Table(title, (), [])
    ends = results["held_out"]["before"], results["held_out"]["after"]
    both = ends[0].keys() & ends[1]
    texts = {t: n for t, n in texts.items() if any(key.startswith(f"{t}/") for key in both)}
    rows = []
    for name, measure in _MEASURES.items():
        cells = [measured(name, line, f"{text}/{name}") for text in texts for line in ends]
        if any(cell != NOTHING for cell in cells):
            rows.append((measure.label, *cells))
    header = [f"{name}, {when}" for name in texts.values() for when in ("before", "after")]
    note = f"{note}. Before: step {ends[0]['step']:,}; after: step {ends[1]['step']:,}"
    return Table(title, ("measure", *header), rows, note)


def _kept(results: dict) -> Table:
    counts = results.get("counts") or {}
    rows = []
    for name, of in (results.get("retention") or {}).items():
        both = [counted_share(of[when], counts.get(name)) for when in ("before", "after")]
        rows.append((visible(name), *both, f"{of['after'] - of['before']:+.1%}"))
    note = "Share of right answers to questions that have nothing to do with the prefix"
    return Table("Kept abilities", ("ability", "before", "after", "change"), rows, note)


def _side_effects(results: dict) -> Table:
    values = results.get("side_effects") or {}
    rows = [(_MEASURES[k].label, measured(k, values)) for k in _OF_CONDITIONS if k in values]
    note = "The trained student against the untrained one on unrelated prompts, means over tokens"
    return Table("Side effects", ("measure", "value"), rows, note)


def _prefix_cost(results: dict) -> Table:
    if not results.get("prefix_cost"):
        return Table("Cost of the prefix", (), [])
    cost = results["prefix_cost"]
    seconds = cost["seconds"]
    rows = [("tokens saved a prompt", f"{cost['tokens_saved']:,.1f}")]
    for key, label in (
        ("without", "seconds without it"),
        ("with", "seconds with it"),
        ("with_kept", "seconds with it, kept in memory"),
    ):
        if key in seconds:
            ratio = f" ({seconds[key] / seconds['without']:.2f}x)" if key != "without" else ""
            rows.append((label, f"{seconds[key]:.3f}{ratio}"))
    note = f"One batch of {cost['rows']} rows, up to {cost['new_tokens']} new tokens a row; medians"
    return Table("Cost of the prefix", ("", "value"), rows, note)


def _server(results: dict) -> Table:
    """What a teacher at a server was asked, see `teachers.server.scheduler.Pool.report`."""
    names = {"asked": "requests", "stored": "answered by the store", "bought": "by the server"}
    names |= {"read_tokens": "tokens read", "written_tokens": "tokens written"}
    names |= {"retries": "retries", "unmapped": "best tokens without an id here"}
    names |= {"lost": "responses without an id here"}
    counts = results.get("teacher") or {}
    rows = [(label, f"{counts[key]:,}") for key, label in names.items() if key in counts]
    return Table("The teacher at its server", ("", "value"), rows)


def _unavailable(results: dict) -> Table:
    reasons = results.get("unavailable") or {}
    rows = [(visible(name), visible(why)) for name, why in reasons.items()]
    return Table("Not measured, and why", ("measure", "why"), rows, labels=2, prose=True)


def cells(found: Sequence[Table]) -> Iterator[tuple[tuple[str, str], str]]:
    """((title of the table, name of the measure), cell) of all numbers in the tables."""
    for table in found:
        if table.prose:
            continue
        columns = table.header[table.labels :]
        for row in table.rows:
            for column, cell in zip(columns, row[table.labels :], strict=True):
                name = f"{row[0]}, {column}" if len(columns) > 1 else row[0]
                yield (table.title, name), cell
