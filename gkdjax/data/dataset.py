"""The rows of one stream, from examples to the batch of each step."""

import collections
import copy
import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from gkdjax.config import Config
from gkdjax.data import batching, truncation
from gkdjax.data.batching import BatchShape, Shape
from gkdjax.data.chat_template import Chat
from gkdjax.data.conversations import split_answers
from gkdjax.data.examples import BadRows
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.views import RowStatus, ViewRules
from gkdjax.losses.objective import TopKTargets
from gkdjax.models.prefix_cache import worth_keeping
from gkdjax.types import Batch, Completion, Example, Message, Prompt, View, ViewPair
from gkdjax.utils.errors import UserError
from gkdjax.utils.text import some

# Of either view. Rows of similar length may be of one kind; an anchor's batch must hold every kind.
_MOST_PADDING = 0.2


@dataclasses.dataclass(frozen=True)
class RolloutFilter:
    """Which completions are learnt from."""

    targets: TargetRules  # a completion must have a target, if the assistant's messages are trained
    max_retries: int  # a completion that is refused is written again so many times
    max_new_tokens: int
    shared: int | None = None  # the student has only the ids below; None: it has all

    def status(self, completion: Completion, chat: Chat) -> RowStatus:
        """KEPT, EMPTY or UNMATCHED."""
        ids = completion.ids
        if len(ids) == 0 or (self.shared is not None and ids.max() >= self.shared):
            return RowStatus.EMPTY
        trained = "assistant" in self.targets.roles
        if trained and not self.targets.of_completion(completion, chat).any():
            return RowStatus.UNMATCHED
        return RowStatus.KEPT


class _Row(NamedTuple):
    """An example with its own response, or for one of the completions that it gets."""

    example: Example  # as it is trained, shortened if it was too long
    prefix: tuple[Message, ...]  # before it was shortened
    prompts: tuple[np.ndarray, np.ndarray]  # of the student's and the teacher's view
    untargeted: int  # tokens of the teacher's prompt up to where its first target is predicted
    own: tuple[ViewPair | None, RowStatus] | None  # with its own response; None: not rendered
    number: int = 0  # of its completion


def _as_beginning(prompt: np.ndarray, view: View) -> np.ndarray:
    """The prompt within the view that it begins: a long prefix is kept once a row."""
    beginning = view.ids[: len(prompt)]
    return beginning if np.array_equal(beginning, prompt) else prompt


class DistillDataset:
    """The rows of one stream (training, validation or anchor); batches are a function of the step.

    A row is an example with its own response, or one of `per_prompt` completions of an example
    without. A dataset never changes: `with_rollouts` and `refreshed` give another one, and only
    those give batches. Rows that the chat template does not take, that are too long or whose
    response is not accepted are dropped or cut, counted and named.
    """

    def __init__(
        self,
        config: Config,
        purpose: str,
        examples: Sequence[Example],
        rules: ViewRules,
        batch_size: int,
        bad_rows: BadRows,
        *,
        per_prompt: int,
        own_responses: bool = True,
    ):
        """Renders all rows; UserError if one of them must not be dropped, or none is left.

        `purpose` is the config's key of the rows, as "data.train"; `bad_rows` takes in those that
        the chat template refuses. If `own_responses`, rows are rendered with theirs at once.
        """
        c, self._config, self._batch_size = config.rollout, config, batch_size
        self.purpose, self.rules, self.seed = purpose, rules, config.train.seed
        shared = rules.teacher_chat.shared
        self.responses = RolloutFilter(rules.targets, c.max_retries, c.max_new_tokens, shared)
        self._lost: dict[RowStatus, list[str]] = collections.defaultdict(list)  # names of rows
        self._refused = 0  # completions of the teacher that were not accepted
        self.padding: dict[str, float] = {}  # shares of the off-policy batches
        self.first_pairs: list[ViewPair] = []  # of the off-policy batches, before any refresh
        found = []
        for example in split_answers(examples, purpose, rules):
            with bad_rows.row(example.name):
                found.append(self._rendered(example, own_responses))
        bad_rows.settle(purpose, purpose, len(found))
        if purpose in bad_rows.dropped:
            self._lost[RowStatus.UNUSABLE] += bad_rows.dropped[purpose]
        rendered = [row.example for row in found]
        truncation.require_room_beside_prefix(purpose, rendered, rules, config.context)
        found = self._shortened(found)
        self._prompts = [ids for row in found for ids in row.prompts]  # of dropped rows, too
        # A row whose prompt leaves no room for a single token of a response is dropped.
        fits = [row for row in found if max(map(len, row.prompts)) < rules.max_length]
        endless = {row.example.name for row in found} - {row.example.name for row in fits}
        self._lost[RowStatus.DROPPED] += sorted(endless)
        self._rows = [
            row._replace(number=number)
            for row in fits
            for number in range(per_prompt if row.example.answer is None else 1)
        ]
        if not self._rows:
            self._report_lost(None)
        self._order = self._row_order()

    def __len__(self) -> int:
        return len(self._rows)

    def views_differ(self) -> bool:
        """Whether the teacher reads more than the student in any row."""
        return any(not np.array_equal(*row.prompts) for row in self._rows)

    def prompts_by_prefix(self, others: Sequence[Example]) -> list[list[np.ndarray]]:
        """The teacher's prompts up to their first target, by prefix; those of `others` whole."""
        groups = self._untargeted_prompts()
        for example in others:
            groups[example.prefix].append(self.rules.prompts(example)[1])
        return list(groups.values())

    def examples(self) -> list[Example]:
        """The examples that are left, each once, as they are trained."""
        return list({row.example.row_id: row.example for row in self._rows}.values())

    def needs_responses(self) -> bool:
        return any(row.example.answer is None for row in self._rows)

    def needs_scores(self) -> bool:
        """Whether a teacher has to read any text that it did not write: a row's own targets."""
        return any(
            example.answer is not None or any(self.rules.targets.of_turns(example))
            for example in self.examples()
        )

    def unanswered(self, steps: Sequence[int] | None = None) -> list[int]:
        """The rows without a response: all of them, or those in the batches of `steps`."""
        rows = range(len(self))
        if steps is not None:
            rows = sorted({int(row) for step in steps for row in self.batch_rows(step)})
        return [row for row in rows if self._rows[row].example.answer is None]

    def with_rollouts(self, rollouts: Mapping[int, Completion]) -> "DistillDataset":
        """The rows that can be trained, ready to give off-policy batches.

        `rollouts` has the completion of each row of `unanswered`. UserError: no row is left.
        """
        new = copy.copy(self)
        new._lost = copy.deepcopy(self._lost)
        new._refused = sum(completion.refused for completion in rollouts.values())
        new._rows, pairs = [], []
        for i, row in enumerate(self._rows):
            pair, status = self._pair(row, rollouts.get(i))
            if status is not RowStatus.KEPT:
                new._lost[status].append(row.example.name)
            if pair is not None:
                new._rows.append(row)
                pairs.append(pair)
        new.first_pairs = new._pairs = pairs
        new._report_lost(next(iter(rollouts.values()), None))
        new._choose_batches(by_length=False)
        by_chance = new._view_padding()
        if self.purpose == "data.train" and by_chance > _MOST_PADDING:
            new._choose_batches(by_length=True)
            if new._view_padding() >= by_chance:  # the config's own lengths ask for it
                new._choose_batches(by_length=False)
        logging.info(
            "%s: %d rows; padded shapes (student, teacher, targets): %s; padding: %s",
            *(self.purpose, len(new), ", ".join(map(str, map(tuple, new._first_shapes)))),
            ", ".join(f"{share:.0%} of the {name}" for name, share in new.padding.items()),
        )
        logging.info("%s: the first row, %s", self.purpose, self.rules.described(pairs[0]))
        return new

    def refreshed(
        self, rollouts: Mapping[int, Completion], steps: Sequence[int], step: int
    ) -> "DistillDataset":
        """The same with newer completions in the batches of `steps`, written at `step`.

        A row whose new completion is not accepted, or does not fit, keeps its first one. Other
        refreshes change nothing.
        """
        new = copy.copy(self)
        pairs = {i: self._pair(self._rows[i], rollout)[0] for i, rollout in rollouts.items()}
        accepted = {i: pair for i, pair in pairs.items() if pair is not None}
        new._pairs = [accepted.get(i) or pair for i, pair in enumerate(self.first_pairs)]
        needs = [batching.longest(new._row_shapes(s)) for s in steps]
        new._shapes = batching.extend_shapes(
            self._first_shapes, needs, self._config.data.bucket_lengths
        )
        logging.log(
            logging.WARNING if len(accepted) < len(pairs) else logging.INFO,
            "%s, step %d: %d responses are new; %d rows, whose new one is refused or too long, keep"
            " the first",
            *(self.purpose, step, len(pairs), len(pairs) - len(accepted)),
        )
        return new

    def batch(self, step: int) -> tuple[Batch, TopKTargets | None]:
        """The off-policy batch of a step, all of it in NumPy, and what its writer predicted."""
        pairs = [self._pairs[i] for i in self.batch_rows(step)]
        need = batching.longest(self._row_shapes(step))
        shape = BatchShape(*batching.smallest(self._shapes, need))
        return self.pad(pairs, shape), batching.cached_targets(pairs, shape.targets)

    def batch_rows(self, step: int) -> np.ndarray:
        """int64 [batch_size]: the rows of a step's batch."""
        return self._order.rows(step)

    def names(self, step: int) -> list[str]:
        return [self._rows[row].example.name for row in self.batch_rows(step)]

    def example(self, row: int) -> Example:
        return self._rows[row].example

    def prompt(self, row: int, who: str) -> Prompt:
        """The prompt of a row, for "teacher" or "student"."""
        example, ids = self._rows[row].example, self._rows[row].prompts[who == "teacher"]
        prefix, number = len(example.prefix), self._rows[row].number
        messages = example.prefix + example.turns
        return Prompt(example.name, ids, messages, example.tools, prefix, number)

    def choose_shapes(self, needs: Sequence[Shape]) -> Sequence[Shape]:
        """The padded shapes of all epochs, for the needs of all rows; the first one meets each."""
        batches = [
            batching.longest([needs[i] for i in self.batch_rows(step)])
            for step in range(math.ceil(len(needs) / self._batch_size))
        ]
        return batching.choose_shapes(batches, self._config.data.bucket_lengths)

    def pad(self, pairs: list[ViewPair], shape: BatchShape) -> Batch:
        return batching.pad(pairs, shape, self.rules.student_chat.pad_id)

    def fingerprint(self) -> int:
        """CRC-32 of all that batches are made of before the first step."""
        parts = [row.example.name.encode() for row in self._rows]
        parts += [ids.tobytes() for ids in self._prompts]
        views_of = (view for pair in self.first_pairs for view in (pair.student, pair.teacher))
        parts += [array.tobytes() for view in views_of for array in (view.ids, view.at)]
        return functools.reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0)

    def report(self) -> dict:
        """For results.json: number of rows, status -> names of the rows that have it, ..."""
        counts = {"rows": len(self), "refused_responses": self._refused}
        lost = {status.value: names for status, names in self._lost.items()}
        return {**counts, "padding": self.padding, **lost}

    def _rendered(self, example: Example, own: bool) -> _Row:
        """Raises UserError if the chat template does not take the row."""
        pair = self.rules.pair(example, None) if own and example.answer is not None else None
        prompts = self.rules.prompts(example)
        if pair is not None and pair[0] is not None:
            views = pair[0].student, pair[0].teacher
            prompts = tuple(map(_as_beginning, prompts, views))
        untargeted = len(self.rules.before_targets(example))
        return _Row(example, example.prefix, prompts, untargeted, pair)

    def _shortened(self, rows: Sequence[_Row]) -> list[_Row]:
        """The rows that `data.too_long` leaves, cut if they are too long."""
        left, cut, tokens, rules = [], [], 0, self.rules
        for row in rows:
            shorter = truncation.shortened(row.example, rules, self.responses.max_new_tokens)
            if shorter is None:
                self._lost[RowStatus.DROPPED].append(row.example.name)
                continue
            if shorter is not row.example:
                cut.append(row.example.name)
                tokens += max(rules.lengths(row.example)) - max(rules.lengths(shorter))
                row = self._rendered(shorter, own=False)._replace(prefix=row.prefix)
            left.append(row)
        if cut:
            self._lost[RowStatus.SHORTENED] += cut
            logging.warning(
                "%s: %d rows longer than data.max_length=%d lost %d tokens in all (%s): %s",
                *(self.purpose, len(cut), rules.max_length, tokens, rules.too_long, some(cut)),
            )
        return left

    def _pair(self, row: _Row, completion: Completion | None) -> tuple[ViewPair | None, RowStatus]:
        if completion is not None:
            status = self.responses.status(completion, self.rules.teacher_chat)
            if status is not RowStatus.KEPT:
                return None, status
        elif row.own is not None:
            return row.own
        return self.rules.pair(row.example, completion)

    def _untargeted_prompts(self) -> dict[tuple[Message, ...], list[np.ndarray]]:
        """Prefix -> what the teacher reads before a target, of each example."""
        groups = collections.defaultdict(list)
        for row in {row.example.row_id: row for row in self._rows}.values():
            groups[row.prefix].append(row.prompts[1][: row.untargeted])
        return groups

    def _row_order(self, lengths: Sequence[int] | None = None) -> batching.RowOrder:
        """Rows of one long prefix share batches, and among those the ones of similar length."""
        groups = self._untargeted_prompts().items()
        long = [prefix for prefix, prompts in groups if worth_keeping(prompts) is not None]
        numbers = collections.defaultdict(lambda: -1, {p: number for number, p in enumerate(long)})
        group_of = np.asarray([numbers[row.prefix] for row in self._rows])
        if lengths is not None:
            group_of = group_of * batching.MOST_SHAPES + batching.length_groups(lengths)
        return batching.RowOrder(self.seed, self.purpose, self._batch_size, group_of)

    def _row_shapes(self, step: int) -> list[BatchShape]:
        return [batching.shape_of(self._pairs[i]) for i in self.batch_rows(step)]

    def _choose_batches(self, by_length: bool) -> None:
        """Sets which rows share batches, the shapes of those, and how much of them is padding."""
        lengths = [len(p.student.ids) + len(p.teacher.ids) for p in self._pairs]
        self._order = self._row_order(lengths if by_length else None)
        shapes = self.choose_shapes([batching.shape_of(pair) for pair in self._pairs])
        self._first_shapes = self._shapes = shapes
        steps = range(math.ceil(len(self) / self._batch_size))
        self.padding = batching.padding_shares([self._row_shapes(s) for s in steps], shapes)

    def _view_padding(self) -> float:
        return max(self.padding["student"], self.padding["teacher"])

    def _report_lost(self, first: Completion | None) -> None:
        """Logs the rows that are gone; UserError, with the first completion, if none is left."""
        too_long = f"longer than data.max_length={self.rules.max_length}"
        reasons = {
            RowStatus.DROPPED: too_long,
            RowStatus.TRUNCATED: too_long,
            RowStatus.UNUSABLE: "cannot be read or rendered, see above",
            RowStatus.EMPTY: "a response without a token, or with one that is no id here",
            RowStatus.UNMATCHED: "nothing to learn with context.target_content_pattern="
            f"{self.rules.targets.pattern!r}, or no such response in"
            f" {self.responses.max_retries + 1} attempts",
        }
        lost = {s: self._lost[s] for s in reasons if self._lost.get(s)}
        for status, names in lost.items():
            logging.warning(
                "%s: %d rows %s (%s): %s",
                *(self.purpose, len(names), status.value, reasons[status], some(names)),
            )
        if self._rows:
            return
        message = "; ".join(f"{len(names)} rows: {reasons[s]}" for s, names in lost.items())
        if first is not None:
            text = self.rules.teacher_chat.decode(first.ids)
            message += f". The first response was {text!r}"
        if RowStatus.DROPPED in lost:
            message += "; raise data.max_length, or let data.too_long cut such rows"
        if RowStatus.UNMATCHED in lost:
            message += "; change context.target_content_pattern"
        raise UserError(f"no row of {self.purpose} is left: {message}")
