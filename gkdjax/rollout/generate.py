"""The responses that rows lack: taken over from files, or written, and written again if refused."""

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

Writer = Callable[[Sequence[Prompt], Sequence[int]], list[Completion]]  # (prompts, seeds)


class Generator(NamedTuple):
    """Somebody who writes responses."""

    name: str  # "student", or the teacher's description
    write: Writer


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
    """Row -> its response by the teacher: from the file, the source, or the teacher's hand.

    Args:
      dataset: whose rows are answered; without `dataset.unanswered` rows no file is made.
      generator: the teacher.
      path: of the file of the responses, see `files.write_once`.
      steps: only rows of the batches of these steps; None: all rows.
      step: keeps the seeds of one call apart from those of another.
      source: of responses that are there already, or None.
      chunk: responses written at once.
      show: a progress bar.

    Raises:
      UserError: a file is damaged, or was written for other rows.
    """
    rows = dataset.unanswered(steps)
    if not rows:
        return {}
    chat = dataset.rules.teacher_chat
    requests = [dataset.prompt(row, "teacher") for row in rows]
    taken = {} if source is None else source.responses(requests, dataset.responses, chat)
    # What is taken stands first in the file, so that the rest is written in whole chunks.
    order = [*taken, *(place for place in range(len(rows)) if place not in taken)]

    def write_rest(lines: Sequence[int]) -> list[Completion]:
        places = [order[line] for line in lines]
        rest = [place for place in places if place not in taken]
        written = write(dataset, "teacher", [(step, rows[place]) for place in rest], generator)
        found = taken | dict(zip(rest, written, strict=True))
        return [found[place] for place in places]

    ordered = [requests[place] for place in order]
    written = write_once(path, ordered, write_rest, chat, step=step, chunk=chunk, show=show)
    found = dict(zip(order, written, strict=True))
    return {row: found[place] for place, row in enumerate(rows)}


def write(
    dataset: DistillDataset, who: str, wanted: Sequence[tuple[int, int]], generator: Generator
) -> list[Completion]:
    """A response to each row; one that is refused is written again, up to the dataset's bound.

    Args:
      dataset: of the rows; says what is accepted.
      who: "teacher" or "student", whose view the generator reads.
      wanted: (step, row) of each: the seeds of its attempts follow from them.
      generator: of the responses.
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
        fates = [dataset.responses.fate(completion, chat) for completion in written]
        places = [i for i, f in zip(places, fates, strict=True) if f is not RowStatus.KEPT]
        for i in places:
            refused[i] += 1
    return [
        dataclasses.replace(completion, refused=count, author=generator.name)
        for completion, count in zip(completions, refused, strict=True)
    ]
