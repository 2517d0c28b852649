"""From the files with answers to what is shown of them: a few, next to each other, and counts."""

from collections.abc import Sequence
from typing import NamedTuple

from gkdjax.report.results import CONDITIONS
from gkdjax.report.tables import Table, counted_share, plain

_HANDFUL = 4  # questions of each kind


class Answer(NamedTuple):
    """To one question, under one condition."""

    who: str
    text: str
    right: bool


class Question(NamedTuple):
    """With all that was answered."""

    name: str
    text: str
    expected: str
    answers: list[Answer]


class AnswerSet(NamedTuple):
    """The answers to one set of questions."""

    name: str
    counts: Table  # by condition
    judge: str  # the condition by whose answers the questions were picked
    wrong: list[Question]
    right: list[Question]


def of_sets(records: Sequence[dict]) -> list[AnswerSet]:
    """A handful of the questions that the trained student answers wrong, and of the others.

    Where it was not asked yet, another condition's answers decide.

    Args:
      records: lines of answers.jsonl.
    """
    sets: dict[str, list[dict]] = {}
    for record in records:
        sets.setdefault(record["set"], []).append(record)
    return [_of_set(name, of) for name, of in sets.items()]


def by_step(samples: Sequence[dict], questions: Sequence[str]) -> list[Table]:
    """A table for each question that was shown, with a row for each other answer on the way.

    Args:
      samples: lines of samples.jsonl.
      questions: their text; a question whose text is not known has its number.
    """
    count = max((len(line["answers"]) for line in samples), default=0)
    found = []
    for place in range(count):
        said = [(s["step"], s["answers"][place]) for s in samples if place < len(s["answers"])]
        title = questions[place] if place < len(questions) else f"question {place + 1}"
        found.append(Table(title, ("step", "answer"), _merged(said), prose=True))
    return found


def _merged(said: Sequence[tuple[int, str]]) -> list[tuple[str, str]]:
    """Answers that stay the same from step to step stand once."""
    spans: list[list] = []
    for step, text in said:
        if spans and spans[-1][2] == text:
            spans[-1][1] = step
        else:
            spans.append([step, step, text])
    return [(f"step {a}" if a == b else f"steps {a} to {b}", text) for a, b, text in spans]


def _of_set(name: str, records: Sequence[dict]) -> AnswerSet:
    asked: dict[str, dict[str, dict]] = {}  # question -> condition -> record
    for record in records:
        asked.setdefault(record["name"], {})[record["condition"]] = record
    there = [who for who in CONDITIONS if any(who in of for of in asked.values())]
    judge = "student" if "student" in there else (there or [records[0]["condition"]])[-1]
    judged = [of for of in asked.values() if judge in of]
    wrong, right = ([of for of in judged if of[judge]["right"] is kind] for kind in (False, True))
    return AnswerSet(
        name=plain(name),
        counts=_counts(name, asked, there),
        judge=plain(judge),
        wrong=[_question(of) for of in wrong[:_HANDFUL]],
        right=[_question(of) for of in right[:_HANDFUL]],
    )


def _counts(name: str, asked: dict, there: Sequence[str]) -> Table:
    rows = []
    for who in there:
        marks = [of[who]["right"] for of in asked.values() if who in of]
        right, count = sum(marks), len(marks)
        counts = f"{right:,}", f"{count - right:,}", counted_share(right / count, count)
        rows.append((plain(who), *counts))
    return Table(plain(name), ("condition", "right", "wrong", "share right"), rows)


def _question(of: dict[str, dict]) -> Question:
    first = next(iter(of.values()))
    answers = [
        Answer(plain(who), of[who]["answer"], of[who]["right"]) for who in CONDITIONS if who in of
    ]
    expected = " or ".join(map(str, first["expected"]))
    return Question(first["name"], first["question"], expected, answers)
