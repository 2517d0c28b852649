"""Texts that are compared: prompts, responses to them, and what a teacher says of each token."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from absl import logging
from jax.sharding import Mesh

from gkdjax.config import Config
from gkdjax.data import batching, buckets
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.views import ViewRules
from gkdjax.evaluation.scoring import ScoredText
from gkdjax.models import padding
from gkdjax.teachers.base import Teacher
from gkdjax.teachers.scoring import request_targets
from gkdjax.types import Completion, Example, Message, Prompt, SamplingParams, View, ViewPair
from gkdjax.utils import text as utils_text
from gkdjax.utils.errors import UserError


class Texts:
    """Responses to one set of prompts, greedy ones by the teacher, or whoever writes them."""

    def __init__(
        self,
        config: Config,
        rules: ViewRules,
        teacher: Teacher,
        examples: Sequence[Example],
        mesh: Mesh,
    ):
        """Renders every prompt once.

        Args:
          config: the run's.
          rules: how a prompt becomes a teacher's and a student's view.
          teacher: reads the responses after its own view of the prompt.
          examples: the prompts; of a conversation only the answer to its end is compared.
          mesh: of the run.
        """
        # Text is compared from its beginning to its end, whatever part of it is learnt.
        self._rules = dataclasses.replace(rules, targets=TargetRules(("assistant",)))
        self.examples, self.teacher = examples, teacher
        self._rows, self._mesh = config.eval.batch_size, mesh
        self._allowed_lengths = config.data.bucket_lengths
        self.greedy = SamplingParams(config.eval.max_new_tokens, temperature=0.0, top_p=1.0)
        self.prompts = functools.cache(self._rules.prompts)  # (student's, teacher's) of an example

    @functools.cached_property
    def teachers(self) -> list[Completion]:
        """The teacher's response to each prompt."""
        return self.written_by_teacher(self.examples)

    @functools.cached_property
    def teacher_text(self) -> ScoredText:
        """The same, with what the teacher says of them."""
        return self.score(self.teachers)

    def written_by_teacher(self, examples: Sequence[Example]) -> list[Completion]:
        """The teacher's greedy responses, also to prompts that are not of this set."""
        prompts = [
            Prompt(e.name, self.prompts(e)[1], e.prefix + e.turns, e.tools) for e in examples
        ]
        written = self.teacher.sample(prompts, [0] * len(prompts), self.greedy)
        unread = [e.name for e, t in zip(examples, written, strict=True) if not len(t.ids)]
        if unread:
            logging.warning(
                "evaluation: %d of the teacher's answers have no token, or one that is no id here;"
                " they are wrong answers, and no distance is taken on them: %s",
                *(len(unread), utils_text.some(unread)),
            )
        return written

    def score(self, written: Sequence[Completion]) -> ScoredText:
        """What the teacher says of responses to the first prompts of the set."""
        pairs = [self._pair(*both) for both in zip(self.examples, written, strict=False)]
        if not any(len(pair.target_ids) for pair in pairs):
            raise UserError("none of the responses for the evaluation has a token to compare")
        return self._scored(pairs, self._shapes)

    def under_prefix(self, prefix: tuple[Message, ...]) -> ScoredText:
        """`teacher_text`, but the student reads another prefix before each prompt."""
        pairs = [
            self._under(prefix, example, text)
            for example, text in zip(self.examples, self.teachers, strict=True)
        ]
        longest = max(batching.shape_of(pair).student for pair in pairs)
        longest = padding.round_up(longest, self._allowed_lengths)
        batches, lost = [], 0
        for part, (batch, targets) in zip(
            in_batches(pairs, self._rows), self.teacher_text.batches, strict=True
        ):
            T, N = batch.teacher_tokens_BT.shape[1], batch.target_ids_BN.shape[1]
            shape = batching.BatchShape(longest, T, N)
            under = batching.pad(_filled(part, self._rows), shape, self._rules.student_chat.pad_id)
            mask_BN = batch.target_mask_BN & under.target_mask_BN
            lost += int(batch.target_mask_BN.sum() - mask_BN.sum())
            batches.append((dataclasses.replace(under, target_mask_BN=mask_BN), targets))
        if lost:
            logging.warning(
                "eval.other_prefix: %d tokens of the teacher's answers have no room behind it in"
                " data.max_length, and are not compared",
                lost,
            )
        return ScoredText(batches, self._rows)

    def _under(self, prefix: tuple[Message, ...], example: Example, text: Completion) -> ViewPair:
        """As `_pair`, with the student's view under the prefix; a longer one may hold less text."""
        pair, rules = self._pair(example, text), self._rules
        other = dataclasses.replace(example, prefix=prefix)
        student = self._pair(other, text, dataclasses.replace(rules, retained=len(prefix))).student
        n = min(len(student.at), len(pair.target_ids))
        return dataclasses.replace(
            pair,
            student=View(student.ids, student.at[:n]),
            teacher=View(pair.teacher.ids, pair.teacher.at[:n]),
            target_ids=pair.target_ids[:n],
        )

    @functools.cached_property
    def _shapes(self) -> list[batching.BatchShape]:
        """Of each batch of prompts, with room for the longest text that may be written.

        So they are the same for every text at every time, and compile once.
        """
        longest = Completion(np.zeros(self.greedy.max_new_tokens, np.int32), finished=False)
        pairs = [self._pair(example, longest) for example in self.examples]
        return batch_shapes(pairs, self._rows, self._allowed_lengths)

    def _scored(
        self, pairs: Sequence[ViewPair], shapes_: Sequence[batching.BatchShape]
    ) -> ScoredText:
        pad_id = self._rules.student_chat.pad_id
        return score(pairs, shapes_, self.teacher, self._rows, pad_id, self._mesh)

    def _pair(
        self, example: Example, completion: Completion, rules: ViewRules | None = None
    ) -> ViewPair:
        rules = rules or self._rules
        if len(completion.ids) == 0:
            return self._blank(example, completion)
        example = dataclasses.replace(example, given=len(example.turns))
        return rules.pair(example, completion, too_long="truncate-right")[0]

    def _blank(self, example: Example, completion: Completion) -> ViewPair:
        """Of a response that a server could not tell in tokens of ours: nothing is compared."""
        none = np.zeros(0, np.int32)
        student, teacher = (View(prompt, none) for prompt in self.prompts(example))
        return ViewPair(example.name, example.row_id, student, teacher, none, completion.kept)


def score(
    pairs: Sequence[ViewPair],
    shapes_: Sequence[batching.BatchShape],
    teacher: Teacher,
    rows: int,
    pad_id: int,
    mesh: Mesh,
) -> ScoredText:
    """What a teacher says of the targets of view pairs.

    Args:
      pairs: in order.
      shapes_: of each batch of them, from `batch_shapes`.
      teacher: any; one that works elsewhere is asked for all batches before the first is waited
        for.
      rows: of a batch.
      pad_id: of the tokenizer.
      mesh: of the run.
    """
    batches = []
    for part, shape in zip(in_batches(pairs, rows), shapes_, strict=False):
        filled = _filled(part, rows)
        batch = batching.pad(filled, shape, pad_id)
        real_B1 = np.arange(rows)[:, None] < len(part)
        batch = dataclasses.replace(batch, target_mask_BN=batch.target_mask_BN & real_B1)
        kept = batching.kept_targets(filled, shape.targets)
        names = [pair.name for pair in filled]
        batches.append((batch, request_targets(teacher, batch, names, kept, mesh)))
    return ScoredText([(batch, targets()) for batch, targets in batches], rows)


def batch_shapes(
    pairs: Sequence[ViewPair], rows: int, allowed_lengths: Sequence[int]
) -> list[batching.BatchShape]:
    """Of few different ones, that of each batch."""
    needs = [
        buckets.longest([batching.shape_of(pair) for pair in part])
        for part in in_batches(pairs, rows)
    ]
    chain = buckets.choose(needs, allowed_lengths)
    return [batching.BatchShape(*buckets.smallest(chain, need)) for need in needs]


def check_fits(question: Example, length: int, max_length: int) -> None:
    """Raises UserError for a prompt that leaves no room for an answer."""
    if length >= max_length:
        raise UserError(
            f"{question.name}: the question has {length} tokens with its prefix and leaves no room"
            f" in data.max_length = {max_length}; raise it"
        )


def in_batches(rows: Sequence, size: int) -> list[Sequence]:
    """In order; the last one may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _filled(part: Sequence[ViewPair], rows: int) -> list[ViewPair]:
    return [*part, *[part[-1]] * (rows - len(part))]
