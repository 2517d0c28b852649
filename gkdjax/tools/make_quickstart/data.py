"""The quickstart's data files: training prompts, anchors, and what is held out."""

import dataclasses
import json
import pathlib

import numpy as np

from gkdjax.tools.make_quickstart import task


@dataclasses.dataclass(frozen=True)
class Counts:
    """Rows of each file; `retention` is of each retained ability's."""

    train: int = 4096
    anchor: int = 8192
    questions: int = 1024
    retention: int = 640


def make_files(rng: np.random.Generator, baked: task.Key, counts: Counts) -> dict[str, list[dict]]:
    """File name -> rows. A held-out word never stands in the training rows of its own ability."""
    train, questions = _split(rng, counts.train, counts.questions)
    # Looking up other keys is what baking one of them puts at risk: it gets most of the anchor.
    fifth = counts.anchor // 5
    reverse_anchor, reverse = _split(rng, fifth, counts.retention)
    sort_anchor, sort = _split(rng, fifth, counts.retention)
    others_anchor, others = _split(rng, counts.anchor - 2 * fifth, counts.retention)
    anchor = [
        *(task.reverse_row(word) for word in reverse_anchor),
        *(task.sort_row(word) for word in sort_anchor),
        *(_other_key_row(rng, word, baked) for word in others_anchor),
    ]
    return {
        "train.jsonl": [_unanswered(task.map_row(w, baked, show_key=False)) for w in train],
        "anchor.jsonl": [_conversation(anchor[i]) for i in rng.permutation(len(anchor))],
        "questions.jsonl": [task.map_row(w, baked, show_key=False) for w in questions],
        "retention/reverse.jsonl": [task.reverse_row(word) for word in reverse],
        "retention/sort.jsonl": [task.sort_row(word) for word in sort],
        "retention/other_keys.jsonl": [_other_key_row(rng, word, baked) for word in others],
    }


def write_files(out: pathlib.Path, files: dict[str, list[dict]], baked: task.Key) -> None:
    """One JSON row a line, and the baked prefix in prefix.json."""
    for name, rows in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "prefix.json").write_text(json.dumps(task.key_messages(baked), indent=2) + "\n")


def _split(rng: np.random.Generator, first: int, second: int) -> tuple[list[str], list[str]]:
    words = task.unique_words(rng, first + second)
    return words[:first], words[first:]


def _other_key_row(rng: np.random.Generator, word: str, baked: task.Key) -> task.Row:
    return task.map_row(word, task.draw_other_key(rng, baked), show_key=True)


def _unanswered(row: task.Row) -> task.Row:
    return {name: value for name, value in row.items() if name != "answer"}


def _conversation(row: task.Row) -> task.Row:
    """The answer as the response to learn from, so that nobody has to write one."""
    return _unanswered(row) | {"response": row["answer"]}
