"""The tables of a run: the terminal, report.html and tools.compare show these and no others.

Each number is formatted here, once.
"""

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from gkdjax.report.results import CONDITIONS
from gkdjax.utils.text import visible

NOTHING = "-"  # in a cell: not measured
_Z = 1.959963984540054  # 95 % of a normal distribution are within so many standard deviations
_HANDFUL = 4  # questions of each kind


class Table(NamedTuple):
    """Cells are text already."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    labels: int = 1  # so many columns say what a row is; the others are measured
    prose: bool = False  # the last column holds sentences


class AnswerSet(NamedTuple):
    """The answers to one set of questions, a few next to each other."""

    name: str
    counts: Table  # by condition
    judge: str  # the condition by whose answers the questions were picked
    wrong: list[dict[str, dict]]  # question -> condition -> line of answers.jsonl
    right: list[dict[str, dict]]


nats, share = "{:.4f}".format, "{:.1%}".format
# Key -> label and form.
_MEASURES = {
    "loss": ("loss", "{:.4f}"),
    "forward_kl": ("forward KL", "{:.4f}"),
    "reverse_kl": ("reverse KL", "{:.4f}"),
    "teacher_top_k_mass": ("teacher's top-k mass", "{:.2%}"),
    "student_top_k_mass": ("student's top-k mass", "{:.2%}"),
    "top1_agreement": ("top-1 agreement", "{:.2%}"),
    "acceptance_rate": ("acceptance rate", "{:.2%}"),
    "perplexity": ("perplexity", "{:,.2f}"),
}
_DISTANCES = ("forward_kl", "reverse_kl", "top1_agreement", "acceptance_rate", "perplexity")
_DISTANCES = {key: _MEASURES[key] for key in _DISTANCES}
_TRAINING = {
    "steps": ("steps", "{:,}"),
    "tokens": ("tokens", "{:,}"),
    "on_policy_steps": ("on-policy steps", "{:,}"),
    "bad_steps": ("steps that changed nothing", "{:,}"),
    "compilations": ("compilations", "{:,}"),
    "loss": ("last loss", "{:.4f}"),
    "seconds": ("seconds", "{:,.0f}"),
}
_SERVER = {  # see `teachers.server.scheduler.Pool.report`
    "asked": ("requests", "{:,}"),
    "stored": ("answered by the store", "{:,}"),
    "bought": ("by the server", "{:,}"),
    "read_tokens": ("tokens read", "{:,}"),
    "written_tokens": ("tokens written", "{:,}"),
    "retries": ("retries", "{:,}"),
    "unmapped": ("best tokens without an id here", "{:,}"),
    "lost": ("responses without an id here", "{:,}"),
}


def tables(results: dict) -> list[Table]:
    """All tables that there is something for.

    Args:
      results: the content of results.json, or `results.so_far`.
    """
    texts = {"teacher_text": "teacher's text", "student_text": "student's text"}
    read = "Means over tokens; the teacher has read the prefix"
    unrelated = "The trained student against the untrained one on unrelated prompts, means over"
    effects = _values("Side effects", _DISTANCES, results.get("side_effects") or {})
    reasons = [(visible(k), visible(why)) for k, why in (results.get("unavailable") or {}).items()]
    made = [
        _answers(results),
        _recovery(results),
        _distances(results),
        _before_after(results, "Before and after training", texts, read),
        _before_after(
            results, "Validation", {"validation": "validation"}, "Rows that are not trained"
        ),
        _retention(results),
        effects._replace(header=("measure", "value"), note=f"{unrelated} tokens"),
        _prefix_cost(results),
        Table("Not measured, and why", ("measure", "why"), reasons, labels=2, prose=True),
        _values("Training", _TRAINING, results),
        _rows(results),
        _values("The teacher at its server", _SERVER, results.get("teacher") or {}),
    ]
    return [table for table in made if table.rows]


def side_by_side(samples: dict[str, Sequence[str]]) -> list[Table]:
    """A table for each sample question, with a row for each condition's answer.

    Args:
      samples: `results["samples"]`.
    """
    return [
        Table(
            visible(question),
            ("who", "answer"),
            [
                (plain(who), visible(samples[who][place]))
                for who in CONDITIONS
                if who in samples and place < len(samples[who])
            ],
            prose=True,
        )
        for place, question in enumerate(samples.get("question") or ())
    ]


def by_step(samples: Sequence[dict], questions: Sequence[str]) -> list[Table]:
    """A table for each sample question; an answer that stays the same from step to step is one row.

    Args:
      samples: lines of samples.jsonl.
      questions: their text; a question whose text is not known has its number.
    """
    found = []
    for place in range(max((len(line["answers"]) for line in samples), default=0)):
        lines = [line for line in samples if place < len(line["answers"])]
        rows = []
        answers = ((line["answers"][place], line["step"]) for line in lines)
        for text, same in itertools.groupby(answers, operator.itemgetter(0)):
            first, *others = (step for _, step in same)
            rows.append((f"steps {first} to {others[-1]}" if others else f"step {first}", text))
        title = questions[place] if place < len(questions) else f"question {place + 1}"
        found.append(Table(title, ("step", "answer"), rows, prose=True))
    return found


def answer_sets(records: Sequence[dict]) -> list[AnswerSet]:
    """A handful of the questions that the trained student answers wrong, and of the others.

    If it has no answers yet, another condition's decide.

    Args:
      records: lines of answers.jsonl.
    """
    sets: dict[str, dict[str, dict[str, dict]]] = {}  # set -> question -> condition -> line
    for line in records:
        sets.setdefault(line["set"], {}).setdefault(line["name"], {})[line["condition"]] = line
    found = []
    for name, questions in sets.items():
        asked = {who for lines in questions.values() for who in lines}
        there = [who for who in CONDITIONS if who in asked] or sorted(asked)
        judge = "student" if "student" in there else there[-1]
        rows, kinds = [], {True: [], False: []}
        for who in there:
            marks = [lines[who]["right"] for lines in questions.values() if who in lines]
            right, count = sum(marks), len(marks)
            shares = counted_share(right / count, count)
            rows.append((plain(who), f"{right:,}", f"{count - right:,}", shares))
        for lines in questions.values():
            if judge in lines:
                in_order = {plain(who): lines[who] for who in there if who in lines}
                kinds[lines[judge]["right"]].append(in_order)
        header = ("condition", "right", "wrong", "share right")
        some = (kinds[kind][:_HANDFUL] for kind in (False, True))
        found.append(AnswerSet(plain(name), Table("", header, rows), plain(judge), *some))
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
    """ "83.2% [80.8, 85.4]": with its interval, if the number of answers is known."""
    if not count:
        return share(right)
    low, high = wilson(right, count)
    return f"{share(right)} [{100 * low:.1f}, {100 * high:.1f}]"


def cells(found: Sequence[Table]) -> Iterator[tuple[tuple[str, str], str]]:
    """Yields ((title of the table, name of the measure), cell) of all numbers in the tables."""
    for table in found:
        if table.prose:
            continue
        columns = table.header[table.labels :]
        for row in table.rows:
            for column, cell in zip(columns, row[table.labels :], strict=True):
                name = f"{row[0]}, {column}" if len(columns) > 1 else row[0]
                yield (table.title, name), cell


def _values(title: str, forms: dict[str, tuple[str, str]], values: dict) -> Table:
    rows = []
    for key, (label, form) in forms.items():
        if key in values:
            rows.append((label, NOTHING if values[key] is None else form.format(values[key])))
    return Table(title, ("", "value"), rows)


def _measured(name: str, values: dict, key: str = "") -> str:
    """A cell: `values[key or name]`, formatted as measures of this name are."""
    value = values.get(key or name)
    return NOTHING if value is None else _MEASURES[name][1].format(value)


def _conditions(results: dict, keys: Iterable[str]) -> tuple[dict[str, dict], list[str]]:
    """-> (condition -> its values, the keys that any of them has)."""
    there = {name: results[name] for name in CONDITIONS if name in results}
    return there, [key for key in keys if any(key in values for values in there.values())]


def _answers(results: dict) -> Table:
    counts = results.get("counts") or {}
    sets = {"accuracy": ("accuracy", "questions"), "heldout_accuracy": ("held-out", "heldout")}
    there, keys = _conditions(results, sets)
    rows = []
    for name, values in there.items() if keys else ():
        rows.append([plain(name), *CONDITIONS[name]])
        for key in keys:
            count = counts.get(sets[key][1])
            rows[-1].append(counted_share(values[key], count) if key in values else NOTHING)
    header = ("condition", "who answers", "what it reads", *(sets[key][0] for key in keys))
    note = "Share of right answers, with its 95 % interval (Wilson)"
    return Table("Right answers", header, rows, note, labels=3)


def _recovery(results: dict) -> Table:
    names = {"recovery": "questions", "heldout_recovery": "held-out questions"}
    rows = [
        (label, "not defined" if results[key] is None else f"{results[key]:.3f}")
        for key, label in names.items()
        if key in results
    ]
    note = "(student - base) / (prompted teacher - base); not defined where the prefix changes"
    return Table("Recovery of the prefix", ("", "recovery"), rows, f"{note} nothing")


def _distances(results: dict) -> Table:
    there, keys = _conditions(results, _DISTANCES)
    rows = [
        (plain(name), *(_measured(key, values) for key in keys))
        for name, values in there.items()
        if any(key in values for key in keys)
    ]
    header = ("condition", *(_MEASURES[key][0] for key in keys))
    note = "Means over the tokens of the teacher's own answers; divergences in nats a token"
    return Table("Distance to the prompted teacher", header, rows, note)


def _before_after(results: dict, title: str, texts: dict[str, str], note: str) -> Table:
    """The lines of eval.jsonl at both ends, for the texts that both of them have."""
    if "held_out" not in results:
        return Table(title, (), [])
    ends = results["held_out"]["before"], results["held_out"]["after"]
    both = ends[0].keys() & ends[1]
    texts = {t: n for t, n in texts.items() if any(key.startswith(f"{t}/") for key in both)}
    rows = []
    for name, (label, _) in _MEASURES.items():
        row = [_measured(name, line, f"{text}/{name}") for text in texts for line in ends]
        if any(cell != NOTHING for cell in row):
            rows.append((label, *row))
    header = [f"{name}, {when}" for name in texts.values() for when in ("before", "after")]
    note = f"{note}. Before: step {ends[0]['step']:,}; after: step {ends[1]['step']:,}"
    return Table(title, ("measure", *header), rows, note)


def _retention(results: dict) -> Table:
    counts = results.get("counts") or {}
    rows = []
    for name, values in (results.get("retention") or {}).items():
        both = [counted_share(values[when], counts.get(name)) for when in ("before", "after")]
        rows.append((visible(name), *both, f"{values['after'] - values['before']:+.1%}"))
    note = "Share of right answers to questions that have nothing to do with the prefix"
    return Table("Kept abilities", ("ability", "before", "after", "change"), rows, note)


def _prefix_cost(results: dict) -> Table:
    if not results.get("prefix_cost"):
        return Table("Cost of the prefix", (), [])
    cost = results["prefix_cost"]
    seconds, rows = cost["seconds"], [("tokens saved a prompt", f"{cost['tokens_saved']:,.1f}")]
    labels = {"without": "seconds without it", "with": "seconds with it"}
    labels["with_kept"] = "seconds with it, kept in memory"
    for key, label in labels.items():
        if key in seconds:
            ratio = f" ({seconds[key] / seconds['without']:.2f}x)" if key != "without" else ""
            rows.append((label, f"{seconds[key]:.3f}{ratio}"))
    note = f"One batch of {cost['rows']} rows, up to {cost['new_tokens']} new tokens a row; medians"
    return Table("Cost of the prefix", ("", "value"), rows, note)


def _rows(results: dict) -> Table:
    """What became of the rows of each dataset."""
    rows = []
    for name, report in (results.get("rows") or {}).items():
        statuses = {status: len(of) for status, of in report.items() if isinstance(of, list)}
        lost = ", ".join(f"{count} {status}" for status, count in statuses.items() if count)
        views = [report["padding"][whose] for whose in ("student", "teacher") if report["padding"]]
        padding = ", ".join(f"{each:.0%}" for each in views)
        counts = str(report["rows"]), lost or NOTHING, str(report["refused_responses"])
        rows.append((plain(name), *counts, padding or NOTHING))
    header = ("rows of", "trained", "lost or cut", "refused responses", "padding of the views")
    return Table("Rows", header, rows)
