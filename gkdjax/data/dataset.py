"""From examples to the batch of step n: whose text it is, and which rows."""

import collections
import functools
import math
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from gkdjax.data import batching, buckets, truncation, views
from gkdjax.data.responses import RolloutFilter, RolloutRequest
from gkdjax.data.views import ViewRules
from gkdjax.models.prefix_cache import worth_keeping
from gkdjax.rollout.generate import Generator, Rollout, write_accepted
from gkdjax.rollout.reuse import Source, write_or_take
from gkdjax.types import Batch, Example, Trajectory, ViewPair
from gkdjax.utils import seeds, text
from gkdjax.utils.errors import UserError


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

    A row is an example with its own response, or one of `per_prompt` trajectories for an example
    without. Rows that are too long are dropped or cut here, once, counted and named; and so are
    those whose response is not accepted. Where more than `most_padding` of random batches would be
    padding, rows of similar length share batches.
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
        self._purpose, self.rules, self.responses = purpose, rules, responses
        self._batch_size, self._seed = batch_size, seed
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
        # Of the off-policy batches: with the first responses, and as they are at the moment.
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

    def prepare(
        self,
        path: pathlib.Path,
        teacher: Generator,
        *,
        source: Source | None,
        chunk: int,
        show: bool,
    ) -> None:
        """Builds the off-policy view pairs; the teacher answers the rows that have no response.

        Args:
          path: of the file for the responses, see `files.write_once`.
          teacher: who writes them.
          source: of responses that are there already, or None.
          chunk: responses written at once.
          show: a progress bar.
        """
        rows = [i for i, (example, _) in enumerate(self._examples) if example.answer is None]
        written = self._teacher_text(path, rows, 0, teacher, source, chunk, show)
        self.refused = sum(one.refused for one in written.values())
        kept = []
        for i, row in enumerate(self._examples):
            trajectory = written[i].trajectory if i in written else None
            pair, fate = self._pair(row[0], trajectory)
            if fate is not views.RowStatus.KEPT:
                self.fates[fate.value].append(row[0].name)
            if pair is not None:
                kept.append(row)
                self.first_pairs.append(pair)
        self._own = {}  # they are kept as `first_pairs`
        texts = [self.rules.teacher_chat.decode(w.trajectory.ids) for w in written.values()][:1]
        self._take_rows(kept)
        self._pairs = list(self.first_pairs)
        self._report_fates(texts)
        self._choose_first_shapes()
        by_chance = self._padding_of_views()
        if by_chance > self._most_padding:
            self._take_rows(kept, by_length=True)
            self._choose_first_shapes()
            if self._padding_of_views() >= by_chance:  # the config's own lengths ask for it
                self._take_rows(kept)
                self._choose_first_shapes()
        logging.info(
            "%s: %d rows; padded shapes (student, teacher, targets): %s; padding: %s",
            *(self._purpose, len(self), ", ".join(map(str, map(tuple, self._first_shapes)))),
            ", ".join(f"{share:.0%} of the {name}" for name, share in self.padding.items()),
        )
        logging.info("%s: the first row, %s", self._purpose, self.rules.described(self._pairs[0]))

    def refresh(
        self, path: pathlib.Path, steps: Sequence[int], step: int, teacher: Generator, **how
    ) -> None:
        """The batches of `steps` get responses that the teacher writes anew.

        A row whose new response is not accepted, or does not fit, keeps its first one. What the
        batches look like follows from `steps` and `prepare`, not from other calls.

        Args:
          path: of the file for the new responses.
          steps: whose batches they are for.
          step: keeps the seeds of one call apart from those of another.
          teacher: who writes them.
          **how: chunk and show, as for `prepare`.
        """
        rows = sorted({int(i) for s in steps for i in self.batch_rows(s)})
        rows = [i for i in rows if self._examples[i][0].answer is None]
        written = self._teacher_text(path, rows, step, teacher, None, **how)
        self._pairs = list(self.first_pairs)
        first_stays = 0
        for i, one in written.items():
            pair, _ = self._pair(self._examples[i][0], one.trajectory)
            first_stays += pair is None
            self._pairs[i] = self._pairs[i] if pair is None else pair
        needs = [
            buckets.longest([batching.shape_of(p) for p in self._batch_pairs(s)]) for s in steps
        ]
        self._shapes = buckets.extend(self._first_shapes, needs, self._allowed_lengths)
        level = logging.WARNING if first_stays else logging.INFO
        logging.log(
            level,
            "%s, step %d: %d responses are new; %d rows, whose new one is refused or too long, keep"
            " the first",
            *(self._purpose, step, len(written), first_stays),
        )

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

    def asked(self, row: int, who: str) -> RolloutRequest:
        """The response of a row that "teacher" or "student" is asked for."""
        example, number = self._examples[row]
        prompt = self._prompts[example.row_id][who == "teacher"]
        return RolloutRequest(
            example.name, number, prompt, example.prefix, example.turns, example.tools
        )

    def write(
        self, wanted: Sequence[tuple[int, int]], who: str, author: Generator
    ) -> list[Rollout]:
        """Responses, accepted as far as the rules' bound allows.

        Args:
          wanted: (step, row) of each: the seeds of its attempts follow from them.
          who: "teacher" or "student", whose view the author reads.
          author: of the responses.
        """
        purpose = f"{self._purpose}/{'on_policy' if who == 'student' else who}"
        return write_accepted(
            author,
            [self.asked(row, who).for_writer() for _, row in wanted],
            lambda place, attempt: seeds.fold(self._seed, purpose, *wanted[place], attempt),
            self.responses,
            self.rules.student_chat if who == "student" else self.rules.teacher_chat,
        )

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

    def _teacher_text(
        self,
        path: pathlib.Path,
        rows: Sequence[int],
        step: int,
        teacher: Generator,
        source: Source | None,
        chunk: int,
        show: bool,
    ) -> dict[int, Rollout]:
        """Row -> its response, from the file, the source, or the teacher's hand."""
        if not rows:
            return {}
        written = write_or_take(
            path,
            [self.asked(i, "teacher") for i in rows],
            lambda places: self.write([(step, rows[p]) for p in places], "teacher", teacher),
            self.rules.teacher_chat,
            source,
            self.responses,
            step=step,
            chunk=chunk,
            show=show,
        )
        return dict(zip(rows, written, strict=True))

    def _pair(self, example: Example, trajectory: Trajectory | None):
        if trajectory is not None:
            fate = self.responses.fate(trajectory, self.rules.teacher_chat)
            if fate is not views.RowStatus.KEPT:
                return None, fate
        if trajectory is None and example.row_id in self._own:
            return self._own[example.row_id]
        return self.rules.pair(example, trajectory)

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
        self._order = batching.RowOrder(self._seed, self._purpose, self._batch_size, groups)

    def _prompts_by_prefix(self, examples: Sequence[Example]) -> dict:
        groups = collections.defaultdict(list)
        for example in examples:
            prompt = self._prompts[example.row_id][1][: self._untargeted[example.row_id]]
            groups[self._prefixes[example.row_id]].append(prompt)
        return groups

    def _shorten(self, examples: Sequence[Example]) -> list[Example]:
        found = truncation.shortened(
            self._purpose, examples, self.rules, self.responses.max_new_tokens
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
        report_fates(self._purpose, self.fates, self.rules, self.responses, texts, rest)


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
        f" {responses.max_refills + 1} attempts",
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
