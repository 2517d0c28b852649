"""From examples to the batch of step n: whose text it is, and which rows."""

import collections
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from gkdjax import seeds
from gkdjax.data import pipeline, shapes, views
from gkdjax.data.chat import Chat
from gkdjax.errors import UserError
from gkdjax.trajectories import ResponseRules, Writer, write_accepted, write_once
from gkdjax.types import Batch, Example, TopKTargets, Trajectory, View, ViewPair


@dataclasses.dataclass(frozen=True)
class ViewRules:
    """How the examples of one stream become view pairs; see `data.views.view_pair`."""

    student_chat: Chat
    teacher_chat: Chat
    retained: int
    target_roles: tuple[str, ...]
    max_length: int
    too_long: str

    def pair(self, example: Example, trajectory: Trajectory | None, *, too_long: str | None = None):
        """-> (ViewPair or None, its fate)."""
        return views.view_pair(
            example,
            self.student_chat,
            self.teacher_chat,
            retained=self.retained,
            target_roles=self.target_roles,
            trajectory=trajectory,
            max_length=self.max_length,
            too_long=too_long or self.too_long,
        )

    def prompts(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """-> (student's, teacher's) generation prompts."""
        return views.prompts(example, self.student_chat, self.teacher_chat, self.retained)


class OnPolicyBatch(NamedTuple):
    """A batch that the student has just written."""

    batch: Batch
    refused: int  # responses that were not accepted, and written again where that was still allowed
    dropped: int  # rows that are in the batch without a target, because their last one was refused


class Feed:
    """One stream of rows (training or anchor); the batch of a step is a function of the step.

    A row is an example with its own response, or one of `per_prompt` trajectories for an example
    without. Rows that are too long are dropped or cut here, once, counted and named; and so are
    those whose response is not accepted.
    """

    def __init__(
        self,
        purpose: str,
        examples: Sequence[Example],
        rules: ViewRules,
        responses: ResponseRules,
        *,
        per_prompt: int,
        batch_size: int,
        allowed_lengths: Sequence[int],
        seed: int,
    ):
        self._purpose, self._rules, self._responses = purpose, rules, responses
        self._batch_size, self._seed = batch_size, seed
        self._allowed_lengths = allowed_lengths
        self._examples = [
            (example, number)
            for example in examples
            for number in range(per_prompt if example.response is None else 1)
        ]
        self._prompts = {example.row_id: rules.prompts(example) for example in examples}
        self._pairs: list[ViewPair] = []
        self._shapes: Sequence[shapes.Shape] = ()
        self.refused = 0  # responses of the teacher that were not accepted
        self.fates: dict[str, list[str]] = collections.defaultdict(list)  # fate -> row names
        self._drop_endless_prompts()

    def __len__(self) -> int:
        return len(self._examples)

    def views_differ(self) -> bool:
        """Whether the teacher reads more than the student in any row."""
        return any(not np.array_equal(s, t) for s, t in self._prompts.values())

    def prompts_by_prefix(self, others: Sequence[Example]) -> list[list[np.ndarray]]:
        """The teacher's prompts for the rows and for `others`, those of one prefix together."""
        groups = collections.defaultdict(list)
        rows = {example.row_id: example for example, _ in self._examples}.values()  # each once
        prompts = [(row, self._prompts[row.row_id][1]) for row in rows]
        for example, prompt in [*prompts, *((e, self._rules.prompts(e)[1]) for e in others)]:
            groups[example.prefix].append(prompt)
        return list(groups.values())

    def needs_responses(self) -> bool:
        """Whether any row comes without a response."""
        return any(example.response is None for example, _ in self._examples)

    def prepare(self, path: pathlib.Path, writer: Writer, *, chunk: int, show: bool) -> None:
        """Builds the off-policy view pairs; `writer` answers the rows that have no response."""
        rows = [i for i, (example, _) in enumerate(self._examples) if example.response is None]
        written: dict[int, Trajectory] = {}
        if rows:
            found = write_once(
                path,
                [self._examples[i][0].name for i in rows],
                [self._prompt(i, "teacher") for i in rows],
                lambda places: self._write([rows[p] for p in places], "teacher", 0, writer),
                self._rules.teacher_chat,
                chunk=chunk,
                show=show,
            )
            self.refused = sum(w.refused for w in found)
            written = {i: w.trajectory for i, w in zip(rows, found, strict=True)}
        kept = []
        for i, row in enumerate(self._examples):
            pair, fate = self._pair(row[0], written.get(i))
            if fate is not views.Fate.KEPT:
                self.fates[fate.value].append(row[0].name)
            if pair is not None:
                kept.append(row)
                self._pairs.append(pair)
        example_text = [self._rules.teacher_chat.decode(t.ids) for t in written.values()][:1]
        self._examples = kept
        self._report_fates(example_text)
        self._shapes = self._choose_shapes([pipeline.shape_of(pair) for pair in self._pairs])

    def batch(self, step: int) -> tuple[Batch, TopKTargets | None]:
        """The off-policy batch of a step, as NumPy arrays, and what its writer kept of it."""
        pairs = [self._pairs[i] for i in self._rows(step)]
        need = shapes.longest([pipeline.shape_of(pair) for pair in pairs])
        shape = pipeline.BatchShape(*shapes.smallest(self._shapes, need))
        return self._pad(pairs, shape), pipeline.kept_targets(pairs, shape.targets)

    def on_policy_batch(
        self, step: int, writer: Callable[[Sequence[np.ndarray], Sequence[int], int], list]
    ) -> OnPolicyBatch:
        """The same rows, with responses that the current student writes from its own view.

        Args:
          step: of the run.
          writer: (prompts, seeds, padded prompt length) -> trajectories.
        """
        rows = self._rows(step)
        # Both shapes, the sampler's and the batch's, follow from the prompts: what the student
        # happens to write compiles nothing new.
        need = shapes.longest([self._longest_written[i] for i in rows])
        prompt_length, *lengths = shapes.smallest(self._on_policy_shapes, need)
        written = self._write(
            list(rows), "student", step, lambda prompts, keys: writer(prompts, keys, prompt_length)
        )
        pairs, dropped = [], 0
        for i, (trajectory, _) in zip(rows, written, strict=True):
            pair = None
            if self._responses.fate(trajectory, self._rules.student_chat) is views.Fate.KEPT:
                pair = self._student_pair(i, trajectory)
            dropped += pair is None
            pairs.append(self._blank(i) if pair is None else pair)
        refused = sum(w.refused for w in written)
        batch = self._pad(pairs, pipeline.BatchShape(*lengths))
        return OnPolicyBatch(batch, refused, dropped)

    def report(self) -> dict:
        """What became of the rows, for results.json: fate -> names, and the refused responses."""
        return {**self.fates, "refused_responses": self.refused}

    def _pair(self, example: Example, trajectory: Trajectory | None):
        if trajectory is not None:
            fate = self._responses.fate(trajectory, self._rules.teacher_chat)
            if fate is not views.Fate.KEPT:
                return None, fate
        return self._rules.pair(example, trajectory)

    def _student_pair(self, row: int, trajectory: Trajectory) -> ViewPair:
        # A row cannot leave a batch that is already drawn: what does not fit is cut, like any
        # trajectory that reaches max_new_tokens.
        example = dataclasses.replace(self._examples[row][0], response=None)
        return self._rules.pair(example, trajectory, too_long="truncate")[0]

    def _blank(self, row: int) -> ViewPair:
        """A row of the batch that teaches nothing."""
        example, none = self._examples[row][0], np.zeros(0, np.int32)
        student, teacher = (View(ids, none) for ids in self._prompts[example.row_id])
        return ViewPair(example.name, example.row_id, student, teacher, none)

    def _write(self, rows: Sequence[int], author: str, step: int, writer: Writer):
        purpose = f"{self._purpose}/{'on_policy' if author == 'student' else author}"
        chat = self._rules.student_chat if author == "student" else self._rules.teacher_chat
        return write_accepted(
            writer,
            [self._prompt(i, author) for i in rows],
            lambda place, attempt: seeds.fold(self._seed, purpose, step, rows[place], attempt),
            self._responses,
            chat,
        )

    def _prompt(self, row: int, author: str) -> np.ndarray:
        return self._prompts[self._examples[row][0].row_id][author == "teacher"]

    @functools.cached_property
    def _longest_written(self) -> list[shapes.Shape]:
        """(prompt, *BatchShape) of each row if the student writes as much as it may."""
        # Any token does: only the lengths are of interest.
        most = Trajectory(np.zeros(self._responses.max_new_tokens, np.int32), finished=False)
        return [
            (len(self._prompt(i, "student")), *pipeline.shape_of(self._student_pair(i, most)))
            for i in range(len(self._examples))
        ]

    @functools.cached_property
    def _on_policy_shapes(self) -> Sequence[shapes.Shape]:
        return self._choose_shapes(self._longest_written)

    def _choose_shapes(self, needs: Sequence[shapes.Shape]) -> Sequence[shapes.Shape]:
        """Of the batches of the first epoch, so that no later one needs another."""
        steps = math.ceil(len(needs) / self._batch_size)
        batches = [shapes.longest([needs[i] for i in self._rows(step)]) for step in range(steps)]
        return shapes.choose(batches, self._allowed_lengths)

    def _pad(self, pairs: list[ViewPair], shape: pipeline.BatchShape) -> Batch:
        return pipeline.pad(pairs, shape, self._rules.student_chat.pad_id)

    def _rows(self, step: int) -> np.ndarray:
        return pipeline.batch_rows(
            self._seed, self._purpose, step, self._batch_size, len(self._examples)
        )

    def _drop_endless_prompts(self) -> None:
        """Without room for a single response token there is no training row."""
        fits = {
            row_id: max(len(prompt) for prompt in both) < self._rules.max_length
            for row_id, both in self._prompts.items()
        }
        dropped = {example.name for example, _ in self._examples if not fits[example.row_id]}
        self.fates[views.Fate.DROPPED.value].extend(sorted(dropped))
        self._examples = [row for row in self._examples if fits[row[0].row_id]]
        if not self._examples:
            self._report_fates([])

    def _report_fates(self, example_text: list[str]) -> None:
        """Names the rows that are gone; raises UserError if none is left."""
        reasons = {
            views.Fate.DROPPED.value: f"longer than data.max_length={self._rules.max_length}",
            views.Fate.TRUNCATED.value: f"longer than data.max_length={self._rules.max_length}",
            views.Fate.EMPTY.value: "a response without a token",
            views.Fate.UNMATCHED.value: "no response with trajectory.target_content_pattern="
            f"{self._responses.pattern!r} in {self._responses.max_refills + 1} attempts",
        }
        for fate, names in self.fates.items():
            if names:
                shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                logging.warning(
                    "%s: %d rows %s (%s): %s",
                    *(self._purpose, len(names), fate, reasons[fate], shown),
                )
        if not self._examples:
            found = "; ".join(
                f"{len(names)} rows: {reasons[fate]}" for fate, names in self.fates.items() if names
            )
            seen = f". The first response was {example_text[0]!r}" if example_text else ""
            raise UserError(
                f"no row of {self._purpose} is left: {found}{seen}. Raise data.max_length, set"
                " data.too_long='truncate', or change trajectory.target_content_pattern"
            )
