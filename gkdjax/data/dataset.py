"""From examples to the batch of step n: whose text it is, and which rows."""

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

from gkdjax.data import batching, buckets, truncation, views
from gkdjax.data.chat_template import Chat
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.views import ViewRules
from gkdjax.models.prefix_cache import worth_keeping
from gkdjax.types import Batch, Completion, Example, Prompt, ViewPair
from gkdjax.utils import text
from gkdjax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class RolloutFilter:
    """Which completions are learnt from.

    Attributes:
      targets: a completion must have a target by them, if the assistant's messages are trained.
      max_retries: a completion that is refused is written again at most so many times.
      max_new_tokens: its longest length.
      shared: the student has the ids below it alone; None: it has all.
    """

    targets: TargetRules
    max_retries: int
    max_new_tokens: int
    shared: int | None = None

    def fate(self, completion: Completion, chat: Chat) -> views.RowStatus:
        """KEPT, EMPTY or UNMATCHED."""
        if len(completion.ids) == 0:
            return views.RowStatus.EMPTY
        if self.shared is not None and completion.ids.max() >= self.shared:
            return views.RowStatus.EMPTY
        trained = "assistant" in self.targets.roles
        if trained and not self.targets.of_completion(completion, chat).any():
            return views.RowStatus.UNMATCHED
        return views.RowStatus.KEPT


class Rendered(NamedTuple):
    """An example with all that is rendered of it before anybody writes anything."""

    example: Example
    prompts: tuple[np.ndarray, np.ndarray]  # of the student's and the teacher's view
    untargeted: int  # tokens of the teacher's prompt up to where its first target is predicted
    own: (
        tuple[ViewPair | None, views.RowStatus] | None
    )  # with its own response; None: not asked for

    @classmethod
    def of(cls, example: Example, rules: ViewRules, *, response: bool) -> "Rendered":
        """Renders it, with its own response only where that is wanted and there.

        Raises:
          UserError: the chat template does not take it.
        """
        own = rules.pair(example, None) if response and example.answer is not None else None
        return cls(example, rules.prompts(example), len(rules.before_targets(example)), own)


class DistillDataset:
    """One stream of rows (training or anchor); the batch of a step is a function of the step.

    A row is an example with its own response, or one of `per_prompt` rollouts for an example
    without. Nothing here changes once it is made: `with_rollouts` and `refreshed` give another
    dataset, and batches can be had of those alone. Rows that are too long are dropped or cut here,
    once, counted and named; and so are those whose response is not accepted. Where more than
    `most_padding` of random batches would be padding, rows of similar length share batches.
    """

    def __init__(
        self,
        purpose: str,
        examples: Sequence[Example],
        rules: ViewRules,
        responses: RolloutFilter,
        *,
        per_prompt: int,
        most_padding: float,
        batch_size: int,
        allowed_lengths: Sequence[int],
        seed: int,
        rendered: Sequence[Rendered] = (),
        unusable: Sequence[str] = (),
    ):
        self.purpose, self.seed = purpose, seed
        self.rules, self.responses = rules, responses
        self._batch_size = batch_size
        self._allowed_lengths, self._most_padding = allowed_lengths, most_padding
        self.refused = 0  # responses of the teacher that were not accepted
        self.fates: dict[str, list[str]] = collections.defaultdict(list)  # fate -> row names
        if unusable:
            self.fates[views.RowStatus.UNUSABLE.value] += unusable
        self.padding: dict[str, float] = {}  # shares of the off-policy batches
        self._prefixes = {example.row_id: example.prefix for example in examples}  # not shortened
        examples = self._shorten(examples)
        known = {id(one.example): one for one in rendered}  # of the same rules
        made = [
            known[id(e)] if id(e) in known else Rendered.of(e, rules, response=False)
            for e in examples
        ]
        self._prompts = {one.example.row_id: one.prompts for one in made}
        self._untargeted = {one.example.row_id: one.untargeted for one in made}
        self._own = {one.example.row_id: one.own for one in made if one.own is not None}
        # Of the off-policy batches: with the first responses, and with refreshed ones.
        self.first_pairs: list[ViewPair] = []
        self._pairs: list[ViewPair] = []
        self._first_shapes: Sequence[buckets.Shape] = ()
        self._shapes: Sequence[buckets.Shape] = ()
        self._take_rows(
            [
                (example, number)
                for example in examples
                for number in range(per_prompt if example.answer is None else 1)
            ]
        )
        self._drop_endless_prompts()

    def __len__(self) -> int:
        return len(self._examples)

    def views_differ(self) -> bool:
        """Whether the teacher reads more than the student in any row."""
        return any(not np.array_equal(s, t) for s, t in self._prompts.values())

    def prompts_by_prefix(self, others: Sequence[Example]) -> list[list[np.ndarray]]:
        """What the teacher reads before a target, by prefix; of `others` before the response."""
        groups = self._prompts_by_prefix(self.rows())
        for example in others:
            groups[example.prefix].append(self.rules.prompts(example)[1])
        return list(groups.values())

    def rows(self) -> list[Example]:
        """The examples that are left, each once, as they are trained."""
        return list({example.row_id: example for example, _ in self._examples}.values())

    def needs_responses(self) -> bool:
        """Whether any row comes without a response."""
        return any(example.answer is None for example, _ in self._examples)

    def needs_scores(self) -> bool:
        """Whether a teacher has to read any text that it did not write: a row's own targets."""
        return any(
            example.answer is not None or any(self.rules.targets.of_turns(example))
            for example in self.rows()
        )

    def unanswered(self, steps: Sequence[int] | None = None) -> list[int]:
        """The rows that bring no response: all of them, or those in the batches of `steps`."""
        rows = range(len(self))
        if steps is not None:
            rows = sorted({int(row) for step in steps for row in self.batch_rows(step)})
        return [row for row in rows if self._examples[row][0].answer is None]

    def with_rollouts(self, rollouts: Mapping[int, Completion]) -> "DistillDataset":
        """The rows that can be trained, ready to give off-policy batches.

        Args:
          rollouts: row -> the response of each row of `unanswered`.

        Raises:
          UserError: no row is left.
        """
        new, kept = copy.copy(self), []
        new.fates = collections.defaultdict(list, {f: [*names] for f, names in self.fates.items()})
        new.refused = sum(rollout.refused for rollout in rollouts.values())
        new.first_pairs = []
        for i, row in enumerate(self._examples):
            pair, fate = self._pair(row[0], rollouts.get(i))
            if fate is not views.RowStatus.KEPT:
                new.fates[fate.value].append(row[0].name)
            if pair is not None:
                kept.append(row)
                new.first_pairs.append(pair)
        new._own = {}  # they are kept as `first_pairs`
        new._pairs = new.first_pairs
        texts = [self.rules.teacher_chat.decode(r.ids) for r in rollouts.values()][:1]
        new._take_rows(kept)
        new._report_fates(texts)
        new._choose_batches(kept)
        return new

    def refreshed(
        self, rollouts: Mapping[int, Completion], steps: Sequence[int], step: int
    ) -> "DistillDataset":
        """The same with newer responses in the batches of `steps`.

        A row whose new response is not accepted, or does not fit, has its first one. What the
        batches look like follows from `steps` and `with_rollouts`, not from other refreshes.

        Args:
          rollouts: row -> the new response of each row of `unanswered(steps)`.
          steps: whose batches they are for.
          step: at which they are written, for the log.
        """
        new, first_stays = copy.copy(self), 0
        new._pairs = [*self.first_pairs]
        for i, rollout in rollouts.items():
            pair, _ = self._pair(self._examples[i][0], rollout)
            first_stays += pair is None
            new._pairs[i] = new._pairs[i] if pair is None else pair
        needs = [buckets.longest([*map(batching.shape_of, new._batch_pairs(s))]) for s in steps]
        new._shapes = buckets.extend(self._first_shapes, needs, self._allowed_lengths)
        logging.log(
            logging.WARNING if first_stays else logging.INFO,
            "%s, step %d: %d responses are new; %d rows, whose new one is refused or too long, keep"
            " the first",
            *(self.purpose, step, len(rollouts), first_stays),
        )
        return new

    def batch(self, step: int) -> tuple[Batch, batching.CachedTargets | None]:
        """The off-policy batch of a step, as NumPy arrays, and what its writer kept of it.

        Every process has all of its rows, and sends its devices their own.
        """
        pairs = self._batch_pairs(step)
        need = buckets.longest([batching.shape_of(pair) for pair in pairs])
        shape = batching.BatchShape(*buckets.smallest(self._shapes, need))
        return self.pad(pairs, shape), batching.kept_targets(pairs, shape.targets)

    def names(self, step: int) -> list[str]:
        """Of the rows of a step's batch."""
        return [self._examples[row][0].name for row in self.batch_rows(step)]

    def example(self, row: int) -> Example:
        """The example of a row."""
        return self._examples[row][0]

    def prompt(self, row: int, who: str) -> Prompt:
        """The prompt of a row for "teacher" or "student"."""
        example, number = self._examples[row]
        ids = self._prompts[example.row_id][who == "teacher"]
        messages = example.prefix + example.turns
        return Prompt(example.name, ids, messages, example.tools, len(example.prefix), number)

    def fingerprint(self) -> int:
        """CRC-32 of all that batches are made of before the first step."""
        parts = [example.name.encode() for example, _ in self._examples]
        parts += [ids.tobytes() for both in self._prompts.values() for ids in both]
        views_of = (view for pair in self.first_pairs for view in (pair.student, pair.teacher))
        parts += [array.tobytes() for view in views_of for array in (view.ids, view.at)]
        return functools.reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0)

    def report(self) -> dict:
        """For results.json: how many rows there are, fate -> names of those that it met, ..."""
        counts = {"rows": len(self), "refused_responses": self.refused}
        return {**counts, "padding": self.padding, **self.fates}

    def _pair(self, example: Example, completion: Completion | None):
        if completion is not None:
            fate = self.responses.fate(completion, self.rules.teacher_chat)
            if fate is not views.RowStatus.KEPT:
                return None, fate
        if completion is None and example.row_id in self._own:
            return self._own[example.row_id]
        return self.rules.pair(example, completion)

    def _batch_pairs(self, step: int) -> list[ViewPair]:
        return [self._pairs[i] for i in self.batch_rows(step)]

    def choose_shapes(self, needs: Sequence[buckets.Shape]) -> Sequence[buckets.Shape]:
        """Of the batches of the first epoch, so that no later one needs another."""
        steps = math.ceil(len(needs) / self._batch_size)
        batches = [
            buckets.longest([needs[i] for i in self.batch_rows(step)]) for step in range(steps)
        ]
        return buckets.choose(batches, self._allowed_lengths)

    def pad(self, pairs: list[ViewPair], shape: batching.BatchShape) -> Batch:
        return batching.pad(pairs, shape, self.rules.student_chat.pad_id)

    def batch_rows(self, step: int) -> np.ndarray:
        """int64 [batch_size]: the rows of a step's batch."""
        return self._order.rows(step)

    def _choose_batches(self, rows: list[tuple[Example, int]]) -> None:
        """Which rows share batches, and the shapes of those."""
        self._choose_first_shapes()
        by_chance = self._padding_of_views()
        if by_chance > self._most_padding:
            self._take_rows(rows, by_length=True)
            self._choose_first_shapes()
            if self._padding_of_views() >= by_chance:  # the config's own lengths ask for it
                self._take_rows(rows)
                self._choose_first_shapes()
        logging.info(
            "%s: %d rows; padded shapes (student, teacher, targets): %s; padding: %s",
            *(self.purpose, len(self), ", ".join(map(str, map(tuple, self._first_shapes)))),
            ", ".join(f"{share:.0%} of the {name}" for name, share in self.padding.items()),
        )
        logging.info("%s: the first row, %s", self.purpose, self.rules.described(self._pairs[0]))

    def _choose_first_shapes(self) -> None:
        self._first_shapes = self.choose_shapes([batching.shape_of(p) for p in self._pairs])
        self._shapes = self._first_shapes
        steps = range(math.ceil(len(self) / self._batch_size))
        needs = [[batching.shape_of(pair) for pair in self._batch_pairs(step)] for step in steps]
        self.padding = batching.padding_shares(needs, self._shapes)

    def _padding_of_views(self) -> float:
        return max(self.padding["student"], self.padding["teacher"])

    def _take_rows(self, rows: list[tuple[Example, int]], by_length: bool = False) -> None:
        """(example, number of its response) of each; which of them share batches.

        Rows of one long prefix do, and if wanted of those the ones of similar length.
        """
        self._examples = rows
        by_prefix = self._prompts_by_prefix(self.rows()).items()
        long = [prefix for prefix, prompts in by_prefix if worth_keeping(prompts) is not None]
        number = collections.defaultdict(lambda: -1, {prefix: i for i, prefix in enumerate(long)})
        prefixes = (self._prefixes[example.row_id] for example, _ in rows)
        groups = np.asarray([number[prefix] for prefix in prefixes])
        if by_length:
            lengths = [len(p.student.ids) + len(p.teacher.ids) for p in self.first_pairs]
            groups = groups * buckets.MOST + batching.length_buckets(lengths)
        self._order = batching.RowOrder(self.seed, self.purpose, self._batch_size, groups)

    def _prompts_by_prefix(self, examples: Sequence[Example]) -> dict:
        groups = collections.defaultdict(list)
        for example in examples:
            prompt = self._prompts[example.row_id][1][: self._untargeted[example.row_id]]
            groups[self._prefixes[example.row_id]].append(prompt)
        return groups

    def _shorten(self, examples: Sequence[Example]) -> list[Example]:
        found = truncation.shortened(
            self.purpose, examples, self.rules, self.responses.max_new_tokens
        )
        for fate, names in (
            (views.RowStatus.SHORTENED, found.cut),
            (views.RowStatus.DROPPED, found.dropped),
        ):
            if names:
                self.fates[fate.value] += names
        return found.examples

    def _drop_endless_prompts(self) -> None:
        """Without room for a single response token there is no training row."""
        fits = {
            row_id: max(len(prompt) for prompt in both) < self.rules.max_length
            for row_id, both in self._prompts.items()
        }
        dropped = {example.name for example, _ in self._examples if not fits[example.row_id]}
        self.fates[views.RowStatus.DROPPED.value].extend(sorted(dropped))
        self._take_rows([row for row in self._examples if fits[row[0].row_id]])
        if not self._examples:
            self._report_fates([])

    def _report_fates(self, texts: Sequence[str]) -> None:
        rest = len(self._examples)
        report_fates(self.purpose, self.fates, self.rules, self.responses, texts, rest)


def report_fates(
    purpose: str,
    fates: Mapping[str, Sequence[str]],
    rules: ViewRules,
    responses: RolloutFilter,
    texts: Sequence[str],
    rest: int,
) -> None:
    """Names the rows that are gone.

    Args:
      purpose: of the stream.
      fates: `views.RowStatus` -> names of its rows.
      rules: by which they were made.
      responses: by which their responses were accepted.
      texts: responses, of which the first is shown if nothing is left.
      rest: number of rows that are left.

    Raises:
      UserError: none is left.
    """
    reasons = {
        views.RowStatus.DROPPED.value: f"longer than data.max_length={rules.max_length}",
        views.RowStatus.TRUNCATED.value: f"longer than data.max_length={rules.max_length}",
        views.RowStatus.UNUSABLE.value: "cannot be read or rendered, see above",
        views.RowStatus.EMPTY.value: "a response without a token, or with one that is no id here",
        views.RowStatus.UNMATCHED.value: "nothing to learn with context.target_content_pattern="
        f"{rules.targets.pattern!r}, or no such response in"
        f" {responses.max_retries + 1} attempts",
    }
    gone = [(fate, fates[fate], why) for fate, why in reasons.items() if fate in fates]
    for fate, names, reason in gone:
        if names:
            logging.warning(
                "%s: %d rows %s (%s): %s",
                *(purpose, len(names), fate, reason, text.some(names)),
            )
    if not rest:
        found = "; ".join(f"{len(names)} rows: {why}" for _, names, why in gone if names)
        seen = f". The first response was {texts[0]!r}" if texts else ""
        advice = {
            views.RowStatus.DROPPED.value: "raise data.max_length,"
            " or let data.too_long cut such rows",
            views.RowStatus.UNMATCHED.value: "change context.target_content_pattern",
        }
        told = "".join(f"; {advice[fate]}" for fate, names, _ in gone if names and fate in advice)
        raise UserError(f"no row of {purpose} is left: {found}{seen}{told}")
