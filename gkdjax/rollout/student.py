"""On-policy batches: the rows of a step with responses that the student writes from its own view.

The student writes for a block of steps at once, and the text is on disk before it is used: a run
that continues in the middle of a block reads the rest of the block's text back, because its newer
weights would write other text.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gkdjax.data import batching
from gkdjax.data.dataset import DistillDataset
from gkdjax.data.views import RowStatus, ViewRules
from gkdjax.rollout import files
from gkdjax.rollout.generate import Generator, write
from gkdjax.rollout.schedule import OnPolicySchedule
from gkdjax.types import Batch, Completion, View, ViewPair
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import append

# (prompts, seeds, padded length of the prompts) -> responses
StudentWriter = Callable[[Sequence[np.ndarray], Sequence[int], int], list[Completion]]


class OnPolicyBatch(NamedTuple):
    """A batch that the student has written."""

    batch: Batch
    refused: int  # responses that were not accepted, and were written again where allowed
    dropped: int  # rows of the batch without a target, because their last response was refused
    truncated: int  # rows whose response lost its end to data.max_length


class StudentRollouts:
    """The student's responses to the rows of one dataset, step by step."""

    def __init__(
        self,
        dataset: DistillDataset,
        schedule: OnPolicySchedule,
        path: pathlib.Path,
        *,
        block: int,
        first_step: int,
    ):
        """Continues at `first_step`: text of later weights is removed from the file at `path`.

        `block` steps' text is written at once, at the multiples of it.

        Raises:
          UserError: the file lacks text of the block of `first_step`.
        """
        self._dataset, self._schedule, self._path, self._block = dataset, schedule, path, block
        self._completions: dict[int, list[Completion]] = {}  # of the block's steps
        began = first_step // block * block
        advice = (
            f"put the file back as it was, or remove what is newer than step {began} from"
            f" {path.parent / 'checkpoints'}, or give --workdir another directory"
        )
        records = files.read(path, advice, written_at=int)
        records = [record for record in records if record["written_at"] < first_step]
        if path.exists():
            files.keep_lines(path, len(records))
        self._prefixes = {record["prefix_digest"] for record in records}
        if began == first_step:
            return
        wanted = [(s, row) for s, row in self._rows_of_block(began) if s >= first_step]
        keys = [(s, *dataset.prompt(row, "student").key()) for s, row in wanted]
        records = [r for r in records if r["written_at"] == began and r["step"] >= first_step]
        if [(record["step"], *files.key_of(record)) for record in records] != keys:
            raise UserError(
                f"{path} does not hold the {len(keys)} responses that the student wrote at step"
                f" {began} for step {first_step} and later ones, and by now it would write others;"
                f" {advice}"
            )
        self._take(wanted, [files.completion_of(record) for record in records])

    def write_if_due(self, step: int, writer: StudentWriter) -> None:
        """Writes the text of a whole block at its first step, by the student as it is now."""
        wanted = [] if step % self._block else self._rows_of_block(step)
        if not wanted:
            return
        # Both shapes, the sampler's here and the batch's, follow from the prompts, so what the
        # student happens to write compiles nothing new.
        length, *_ = self._shape([row for _, row in wanted])
        generator = Generator(
            "student", lambda prompts, keys: writer([p.ids for p in prompts], keys, length)
        )
        completions = write(self._dataset, "student", wanted, generator)
        chat = self._dataset.rules.student_chat
        lines = []
        for (s, row), completion in zip(wanted, completions, strict=True):
            prompt = self._dataset.prompt(row, "student")
            more = {"written_at": step}
            lines.append(files.line(prompt, completion, chat, s, self._prefixes, **more))
        append(self._path, "".join(lines))
        self._take(wanted, completions)

    def has(self, step: int) -> bool:
        """Whether the text of an on-policy step is written, and not taken yet."""
        return step in self._completions

    def batch(self, step: int) -> OnPolicyBatch:
        """Returns the batch of an on-policy step, as NumPy arrays; its text must be written."""
        rows, completions = self._dataset.batch_rows(step), self._completions.pop(step)
        rules, pairs, statuses = self._dataset.rules, [], []
        for row, completion in zip(rows, completions, strict=True):
            pair, status = None, self._dataset.responses.status(completion, rules.student_chat)
            if status is RowStatus.KEPT:
                pair, status = self._pair(rules, row, completion)
            statuses.append(status)
            pairs.append(pair or self._without_targets(row))
        batch = self._dataset.pad(pairs, batching.BatchShape(*self._shape(rows)[1:]))
        truncated = statuses.count(RowStatus.TRUNCATED)
        dropped = len(statuses) - statuses.count(RowStatus.KEPT) - truncated
        return OnPolicyBatch(batch, sum(r.refused for r in completions), dropped, truncated)

    def _rows_of_block(self, step: int) -> list[tuple[int, int]]:
        """(step, row) of all on-policy steps of the block of `step`."""
        steps = self._schedule.steps_of_block(step, self._block, on_policy=True)
        return [(s, int(row)) for s in steps for row in self._dataset.batch_rows(s)]

    def _take(self, wanted: Sequence[tuple[int, int]], completions: Sequence[Completion]) -> None:
        self._completions = {step: [] for step, _ in wanted}
        for (step, _), completion in zip(wanted, completions, strict=True):
            self._completions[step].append(completion)

    def _shape(self, rows: Sequence[int]) -> batching.Shape:
        """(padded prompt, *BatchShape) for these rows."""
        need = batching.longest([self._longest_written[i] for i in rows])
        return batching.smallest(self._shapes, need)

    def _pair(
        self, rules: ViewRules, row: int, completion: Completion
    ) -> tuple[ViewPair | None, RowStatus]:
        # A row cannot leave a batch that is chosen already: what does not fit is cut, like any
        # completion that reaches max_new_tokens.
        example = dataclasses.replace(self._dataset.example(row), answer=None)
        return rules.pair(example, completion, too_long="truncate-right")

    def _without_targets(self, row: int) -> ViewPair:
        example, none = self._dataset.example(row), np.zeros(0, np.int32)
        student, teacher = (
            View(self._dataset.prompt(row, who).ids, none) for who in ("student", "teacher")
        )
        return ViewPair(example.name, example.row_id, student, teacher, none)

    @functools.cached_property
    def _longest_written(self) -> list[batching.Shape]:
        """(prompt, *BatchShape) of each row if the student writes as much as it may."""
        rules = self._dataset.rules.with_whole_responses()
        ids = np.zeros(self._dataset.responses.max_new_tokens, np.int32)  # any: lengths matter
        longest = Completion(ids, finished=False)
        needs = []
        for row in range(len(self._dataset)):
            prompt = self._dataset.prompt(row, "student").ids
            needs.append((len(prompt), *batching.shape_of(self._pair(rules, row, longest)[0])))
        return needs

    @functools.cached_property
    def _shapes(self) -> Sequence[batching.Shape]:
        return self._dataset.choose_shapes(self._longest_written)
