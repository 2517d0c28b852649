"""Gets the responses that rows lack: from a file, or from a writer that is asked until it fits."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gkdjax.data.dataset import DistillDataset
from gkdjax.data.views import RowStatus
from gkdjax.rollout.files import write_once
from gkdjax.rollout.reuse import Source
from gkdjax.types import Completion, Prompt
from gkdjax.utils import seeds


class Generator(NamedTuple):
    """A model that writes responses."""

    name: str  # "student", or the teacher's description
    write: Callable[[Sequence[Prompt], Sequence[int]], list[Completion]]  # (prompts, seeds)


def generate(
    dataset: DistillDataset,
    generator: Generator,
    path: pathlib.Path,
    *,
    steps: Sequence[int] | None = None,
    step: int = 0,
    source: Source | None = None,
    chunk: int,
    show: bool,
) -> dict[int, Completion]:
    """Returns row -> its response by the teacher, from the file, the source or the generator.

    Args:
      dataset: without `dataset.unanswered` rows no file is made.
      generator: the teacher.
      path, chunk, show: see `files.write_once`.
      steps: only rows of the batches of these steps; None: all rows.
      step: for the file, and for other seeds than those of another call.
      source: of responses from an earlier run.

    Raises:
      UserError: a file is damaged, or was written for other rows.
    """
    rows = dataset.unanswered(steps)
    if not rows:
        return {}
    chat = dataset.rules.teacher_chat
    prompts = [dataset.prompt(row, "teacher") for row in rows]
    reused = {} if source is None else source.responses(prompts, dataset.responses, chat)
    # What is reused stands first in the file, so that the rest is written in whole chunks.
    order = [*reused, *(place for place in range(len(rows)) if place not in reused)]

    def write_rest(lines: Sequence[int]) -> list[Completion]:
        places = [order[line] for line in lines]
        rest = [place for place in places if place not in reused]
        written = write(dataset, "teacher", [(step, rows[place]) for place in rest], generator)
        found = reused | dict(zip(rest, written, strict=True))
        return [found[place] for place in places]

    ordered = [prompts[place] for place in order]
    written = write_once(path, ordered, write_rest, chat, step=step, chunk=chunk, show=show)
    found = dict(zip(order, written, strict=True))
    return {row: found[place] for place, row in enumerate(rows)}


def write(
    dataset: DistillDataset, who: str, wanted: Sequence[tuple[int, int]], generator: Generator
) -> list[Completion]:
    """Has a response written to each (step, row), again where it is refused, up to a bound.

    The seeds of the attempts follow from step and row. `who` is "teacher" or "student", whose view
    the generator reads.
    """
    purpose = f"{dataset.purpose}/{'on_policy' if who == 'student' else who}"
    chat = dataset.rules.student_chat if who == "student" else dataset.rules.teacher_chat
    prompts = [dataset.prompt(row, who) for _, row in wanted]
    refused, completions = [0] * len(wanted), [None] * len(wanted)
    places = list(range(len(wanted)))
    for attempt in range(dataset.responses.max_retries + 1):
        if not places:
            break
        keys = [seeds.fold(dataset.seed, purpose, *wanted[i], attempt) for i in places]
        written = generator.write([prompts[i] for i in places], keys)
        for i, completion in zip(places, written, strict=True):
            completions[i] = completion
            refused[i] += dataset.responses.status(completion, chat) is not RowStatus.KEPT
        places = [i for i in places if refused[i] == attempt + 1]
    return [
        dataclasses.replace(completion, refused=count, author=generator.name)
        for completion, count in zip(completions, refused, strict=True)
    ]
