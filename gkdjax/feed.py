"""From examples to the batch of step n: whose text it is, and which rows."""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import logging

from gkdjax import seeds
from gkdjax.data import pipeline, views
from gkdjax.data.chat import Chat
from gkdjax.errors import UserError
from gkdjax.trajectories import Writer, write_once
from gkdjax.types import Batch, Example, Message, Trajectory, ViewPair


@dataclasses.dataclass(frozen=True)
class ViewRules:
    """How the examples of one stream become view pairs; see `data.views.view_pair`."""

    student_chat: Chat
    teacher_chat: Chat
    prefix: tuple[Message, ...]
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
            prefix=views.prefix_of(example, self.prefix),
            retained=self.retained,
            target_roles=self.target_roles,
            trajectory=trajectory,
            max_length=self.max_length,
            too_long=too_long or self.too_long,
        )

    def prompts(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """-> (student's, teacher's) generation prompts."""
        prefix = views.prefix_of(example, self.prefix)
        return views.prompts(example, self.student_chat, self.teacher_chat, prefix, self.retained)


class Feed:
    """One stream of rows (training or anchor); the batch of a step is a function of the step.

    A row is an example with its own response, or one of `per_prompt` trajectories for an example
    without. Rows that are too long are dropped or cut here, once, counted and named.
    """

    def __init__(
        self,
        purpose: str,
        examples: Sequence[Example],
        rules: ViewRules,
        *,
        per_prompt: int,
        batch_size: int,
        buckets: Sequence[int],
        seed: int,
    ):
        self._purpose, self._rules = purpose, rules
        self._batch_size, self._buckets, self._seed = batch_size, buckets, seed
        self._examples = [
            (example, number)
            for example in examples
            for number in range(per_prompt if example.response is None else 1)
        ]
        self._prompts = {example.row_id: rules.prompts(example) for example in examples}
        self._pairs: list[ViewPair] = []
        self.fates: dict[str, list[str]] = collections.defaultdict(list)  # fate -> row names
        self._drop_endless_prompts()

    def __len__(self) -> int:
        return len(self._examples)

    def views_differ(self) -> bool:
        """Whether the teacher reads more than the student in any row."""
        return any(not np.array_equal(s, t) for s, t in self._prompts.values())

    def needs_responses(self) -> bool:
        """Whether any row comes without a response."""
        return any(example.response is None for example, _ in self._examples)

    def prepare(self, path: pathlib.Path, writer: Writer, *, chunk: int, show: bool) -> None:
        """Builds the off-policy view pairs; `writer` answers the rows that have no response."""
        rows = [i for i, (example, _) in enumerate(self._examples) if example.response is None]
        written = {}
        if rows:
            trajectories = write_once(
                path,
                [self._examples[i][0].name for i in rows],
                [self._prompts[self._examples[i][0].row_id][1] for i in rows],
                [self._row_seed("teacher", 0, i) for i in rows],
                writer,
                self._rules.teacher_chat,
                chunk=chunk,
                show=show,
            )
            written = dict(zip(rows, trajectories, strict=True))
        kept = []
        for i, (example, number) in enumerate(self._examples):
            pair, fate = self._rules.pair(example, written.get(i))
            if fate is not views.Fate.KEPT:
                self.fates[fate.value].append(example.name)
            if pair is not None:
                kept.append((example, number))
                self._pairs.append(pair)
        self._examples = kept
        self._report_fates()

    def batch(self, step: int) -> Batch:
        """The off-policy batch of a step, as NumPy arrays."""
        return self._pad([self._pairs[i] for i in self._rows(step)])

    def on_policy_batch(self, step: int, writer: Writer) -> Batch:
        """The same rows, with responses that the current student writes from its own view."""
        rows = self._rows(step)
        examples = [self._examples[i][0] for i in rows]
        written = writer(
            [self._prompts[example.row_id][0] for example in examples],
            [self._row_seed("on_policy", step, i) for i in rows],
        )
        # A row cannot leave a batch that is already drawn: what does not fit is cut, like any
        # trajectory that reaches max_new_tokens.
        pairs = [
            self._rules.pair(dataclasses.replace(example, response=None), t, too_long="truncate")[0]
            for example, t in zip(examples, written, strict=True)
        ]
        return self._pad(pairs)

    def _pad(self, pairs: list[ViewPair]) -> Batch:
        return pipeline.pad(pairs, self._buckets, self._rules.student_chat.pad_id)

    def _rows(self, step: int) -> np.ndarray:
        return pipeline.batch_rows(
            self._seed, self._purpose, step, self._batch_size, len(self._examples)
        )

    def _row_seed(self, author: str, step: int, row: int) -> int:
        return seeds.fold(self._seed, f"{self._purpose}/{author}", step, row)

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
            self._report_fates()

    def _report_fates(self) -> None:
        for fate, names in self.fates.items():
            if names:
                shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                logging.warning(
                    "%s: %d rows %s, longer than data.max_length=%d: %s",
                    self._purpose,
                    len(names),
                    fate,
                    self._rules.max_length,
                    shown,
                )
        if not self._examples:
            raise UserError(
                f"no row of {self._purpose} is left: all are longer than data.max_length ="
                f" {self._rules.max_length}; raise it, or set data.too_long='truncate'"
            )
