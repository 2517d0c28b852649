"""On-policy batches: the rows of a step with responses that the student writes from its own view.

The student writes for a block of steps at once, and what it wrote lies on disk before it is used:
a run that continues in the middle of a block reads the rest of the block's text back, as its newer
weights would write another.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gkdjax.data import batching, buckets, views
from gkdjax.data.dataset import DistillDataset
from gkdjax.data.views import ViewRules
from gkdjax.rollout import files
from gkdjax.rollout.generate import Generator, write
from gkdjax.rollout.schedule import OnPolicySchedule
from gkdjax.types import Batch, Completion, View, ViewPair
from gkdjax.utils.errors import UserError

# (prompts, seeds, padded length of the prompts) -> responses
StudentWriter = Callable[[Sequence[np.ndarray], Sequence[int], int], list[Completion]]


class OnPolicyBatch(NamedTuple):
    """A batch that the student has written."""

    batch: Batch
    refused: int  # responses that were not accepted, and written again where that was still allowed
    dropped: int  # rows that are in the batch without a target, because their last one was refused
    truncated: int  # rows whose response lost its end, as data.max_length asks


class StudentRollouts:
    """The student's responses to the rows of one feed, step by step."""

    def __init__(
        self,
        feed: DistillDataset,
        curriculum: OnPolicySchedule,
        path: pathlib.Path,
        *,
        block: int,
        first_step: int,
    ):
        """Goes on at `first_step`: what was written by later weights is taken back.

        Args:
          feed: whose rows are answered.
          curriculum: says at which steps the student writes.
          path: of the file of all its responses.
          block: steps whose text is written at once, at the multiples of it.
          first_step: the first one that this process makes.

        Raises:
          UserError: the file lacks text of the block that `first_step` stands in.
        """
        self._feed, self._curriculum, self._path, self._block = feed, curriculum, path, block
        self._texts: dict[int, list[Completion]] = {}  # of the block's steps
        records = files.read(path, self._advice(first_step), written_at=int)
        records = [record for record in records if record["written_at"] < first_step]
        if path.exists():
            files.keep_lines(path, len(records))
        self._told = files.prefixes_in(records)
        if first_step % block:
            self._read_back(records, first_step)

    def write_if_due(self, step: int, writer: StudentWriter) -> None:
        """At the first step of a block, the text for all of it, by the student as it is now."""
        steps = self._on_policy_steps(step)
        if step % self._block or not steps:
            return
        wanted = [(s, int(row)) for s in steps for row in self._feed.batch_rows(s)]
        # Both shapes, the sampler's here and the batch's, follow from the prompts: what the student
        # happens to write compiles nothing new.
        prompt_length, *_ = self._shape([row for _, row in wanted])
        author = Generator(
            "student", lambda prompts, keys: writer([p.ids for p in prompts], keys, prompt_length)
        )
        written = write(self._feed, "student", wanted, author)
        with self._path.open("a", encoding="utf-8") as file:
            for (s, row), one in zip(wanted, written, strict=True):
                asked, chat = self._feed.prompt(row, "student"), self._feed.rules.student_chat
                file.write(files.line(asked, one, chat, s, self._told, written_at=step))
        self._take(steps, written)

    def has(self, step: int) -> bool:
        """Whether the text of an on-policy step is written, and not taken yet."""
        return step in self._texts

    def batch(self, step: int) -> OnPolicyBatch:
        """The batch of an on-policy step, as NumPy arrays; its text must have been written."""
        rows, written = self._feed.batch_rows(step), self._texts.pop(step)
        pairs, fates = [], []
        for row, one in zip(rows, written, strict=True):
            pair = None
            fate = self._feed.responses.fate(one, self._feed.rules.student_chat)
            if fate is views.RowStatus.KEPT:
                pair, fate = self._pair(self._feed.rules, row, one)
            fates.append(fate)
            pairs.append(self._blank(row) if pair is None else pair)
        shape = batching.BatchShape(*self._shape(rows)[1:])
        refused = sum(one.refused for one in written)
        batch = self._feed.pad(pairs, shape)
        truncated = fates.count(views.RowStatus.TRUNCATED)
        dropped = len(fates) - fates.count(views.RowStatus.KEPT) - truncated
        return OnPolicyBatch(batch, refused, dropped, truncated)

    def _on_policy_steps(self, step: int) -> list[int]:
        return self._curriculum.steps_of_block(step, self._block, on_policy=True)

    def _take(self, steps: Sequence[int], written: Sequence[Completion]) -> None:
        rows = len(written) // len(steps)
        self._texts = {s: list(written[n * rows :][:rows]) for n, s in enumerate(steps)}

    def _read_back(self, records: Sequence[dict], first_step: int) -> None:
        steps = [step for step in self._on_policy_steps(first_step) if step >= first_step]
        began = first_step // self._block * self._block
        wanted = [
            (s, *self._feed.prompt(int(row), "student").key())
            for s in steps
            for row in self._feed.batch_rows(s)
        ]
        records = [r for r in records if r["written_at"] == began and r["step"] >= first_step]
        if [(record["step"], *files.key_of(record)) for record in records] != wanted:
            raise UserError(
                f"{self._path} does not hold the {len(wanted)} responses that the student wrote at"
                f" step {began} for step {first_step} and later ones, and by now it would write"
                f" others; {self._advice(first_step)}"
            )
        if steps:
            self._take(steps, [files.written_of(record) for record in records])

    def _advice(self, step: int) -> str:
        began = step // self._block * self._block
        return (
            f"put the file back as it was, or remove what is newer than step {began} from"
            f" {self._path.parent / 'checkpoints'}, or give --workdir another directory"
        )

    def _shape(self, rows: Sequence[int]) -> buckets.Shape:
        """(padded prompt, *BatchShape) for these rows."""
        need = buckets.longest([self._longest_written[i] for i in rows])
        return buckets.smallest(self._shapes, need)

    def _pair(
        self, rules: ViewRules, row: int, completion: Completion
    ) -> tuple[ViewPair | None, views.RowStatus]:
        # A row cannot leave a batch that is already drawn: what does not fit is cut, like any
        # completion that reaches max_new_tokens.
        example = dataclasses.replace(self._feed.example(row), answer=None)
        return rules.pair(example, completion, too_long="truncate-right")

    def _blank(self, row: int) -> ViewPair:
        """A row of the batch that teaches nothing."""
        example, none = self._feed.example(row), np.zeros(0, np.int32)
        student, teacher = (
            View(self._feed.prompt(row, who).ids, none) for who in ("student", "teacher")
        )
        return ViewPair(example.name, example.row_id, student, teacher, none)

    @functools.cached_property
    def _longest_written(self) -> list[buckets.Shape]:
        """(prompt, *BatchShape) of each row if the student writes as much as it may."""
        # Any token does: only the lengths are of interest.
        rules = self._feed.rules.with_whole_responses()
        most = Completion(np.zeros(self._feed.responses.max_new_tokens, np.int32), finished=False)
        return [
            (
                len(self._feed.prompt(row, "student").ids),
                *batching.shape_of(self._pair(rules, row, most)[0]),
            )
            for row in range(len(self._feed))
        ]

    @functools.cached_property
    def _shapes(self) -> Sequence[buckets.Shape]:
        return self._feed.choose_shapes(self._longest_written)
