"""Makes the texts that are compared: responses to prompts, with a teacher's targets."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from absl import logging
from jax.sharding import Mesh

from gkdjax.config import Config
from gkdjax.data import batching
from gkdjax.data.batching import BatchShape
from gkdjax.data.dataset import DistillDataset
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
    """Responses to one set of prompts: greedy ones by the teacher, or those of another writer."""

    def __init__(
        self,
        config: Config,
        rules: ViewRules,
        teacher: Teacher,
        examples: Sequence[Example],
        mesh: Mesh,
    ):
        """Keeps the prompts; only the answer to the end of a conversation is compared."""
        # A text is compared as a whole, whatever part of it is learnt.
        self._rules = dataclasses.replace(rules, targets=TargetRules(("assistant",)))
        self._config, self.examples, self.teacher, self._mesh = config, examples, teacher, mesh
        self.greedy = SamplingParams(config.eval.max_new_tokens, temperature=0.0, top_p=1.0)
        self.prompts = functools.cache(self._rules.prompts)  # (student's, teacher's) of an example

    @functools.cached_property
    def teachers(self) -> list[Completion]:
        """The teacher's response to each prompt."""
        return self.written_by_teacher(self.examples)

    @functools.cached_property
    def teacher_text(self) -> ScoredText:
        return self.score(self.teachers)

    def written_by_teacher(self, examples: Sequence[Example]) -> list[Completion]:
        """Returns the teacher's greedy responses, also to prompts outside this set."""
        prompts = [
            Prompt(e.name, self.prompts(e)[1], e.prefix + e.turns, e.tools) for e in examples
        ]
        written = self.teacher.sample(prompts, [0] * len(prompts), self.greedy)
        unread = [e.name for e, text in zip(examples, written, strict=True) if not len(text.ids)]
        if unread:
            logging.warning(
                "evaluation: %d of the teacher's answers have no token, or one that is no id here;"
                " they are wrong answers, and no distance is taken on them: %s",
                *(len(unread), utils_text.some(unread)),
            )
        return written

    def score(self, written: Sequence[Completion]) -> ScoredText:
        """Scores responses to the first prompts of the set."""
        pairs = [self._pair(*both) for both in zip(self.examples, written, strict=False)]
        if not any(len(pair.target_ids) for pair in pairs):
            raise UserError("none of the responses for the evaluation has a token to compare")
        pad_id = self._rules.student_chat.pad_id
        return _score(pairs, self._shapes, self.teacher, self._config, pad_id, self._mesh)

    def under_prefix(self, prefix: tuple[Message, ...]) -> ScoredText:
        """Returns `teacher_text`, but the student reads another prefix before each prompt."""
        rules = dataclasses.replace(self._rules, retained=len(prefix))
        examples = [dataclasses.replace(example, prefix=prefix) for example in self.examples]
        pairs = [self._pair(*both, rules) for both in zip(examples, self.teachers, strict=True)]
        need = BatchShape(*batching.longest([batching.shape_of(pair) for pair in pairs]))
        S = padding.round_up(need.student, self._config.data.bucket_lengths)
        batches, lost = [], 0
        for (filled, _), (batch, targets) in zip(
            _in_batches(pairs, self._config), self.teacher_text.batches, strict=True
        ):
            N = batch.target_ids_BN.shape[1]
            shape = BatchShape(S, need.teacher, max(N, need.targets))
            under = batching.pad(filled, shape, self._rules.student_chat.pad_id)
            # A longer view holds less text, and a shorter one may hold more.
            mask_BN = batch.target_mask_BN & under.target_mask_BN[:, :N]
            lost += int(batch.target_mask_BN.sum() - mask_BN.sum())
            batch = dataclasses.replace(
                batch,
                student_tokens_BS=under.student_tokens_BS,
                student_mask_BS=under.student_mask_BS,
                student_at_BN=under.student_at_BN[:, :N],
                target_mask_BN=mask_BN,
            )
            batches.append((batch, targets))
        if lost:
            logging.warning(
                "eval.other_prefix: %d tokens of the teacher's answers have no room behind it in"
                " data.max_length, and are not compared",
                lost,
            )
        return ScoredText(batches, self.teacher_text.rows)

    @functools.cached_property
    def _shapes(self) -> list[BatchShape]:
        """The shape of each batch, with room for the longest text, so that it compiles once."""
        longest = Completion(np.zeros(self.greedy.max_new_tokens, np.int32), finished=False)
        return _shapes_of([self._pair(example, longest) for example in self.examples], self._config)

    def _pair(
        self, example: Example, completion: Completion, rules: ViewRules | None = None
    ) -> ViewPair:
        if len(completion.ids) == 0:  # a server may have written no token that is an id here
            none = np.zeros(0, np.int32)
            student, teacher = (View(prompt, none) for prompt in self.prompts(example))
            return ViewPair(example.name, example.row_id, student, teacher, none, completion.cached)
        example = dataclasses.replace(example, given=len(example.turns))
        return (rules or self._rules).pair(example, completion, too_long="truncate-right")[0]


def score_dataset(
    dataset: DistillDataset, config: Config, teacher: Teacher, mesh: Mesh
) -> ScoredText:
    """Scores the first responses of all rows, those that they bring or that a teacher wrote."""
    pairs = dataset.first_pairs
    shapes, pad_id = _shapes_of(pairs, config), dataset.rules.student_chat.pad_id
    return _score(pairs, shapes, teacher, config, pad_id, mesh)


def _score(pairs, shapes, teacher: Teacher, config: Config, pad_id: int, mesh: Mesh) -> ScoredText:
    """Asks a teacher for the targets of all batches before it waits for the first."""
    rows, batches = config.eval.batch_size, []
    for (filled, real), shape in zip(_in_batches(pairs, config), shapes, strict=False):
        batch = batching.pad(filled, shape, pad_id)
        real_B1 = np.arange(rows)[:, None] < real
        batch = dataclasses.replace(batch, target_mask_BN=batch.target_mask_BN & real_B1)
        cached = batching.cached_targets(filled, shape.targets)
        names = [pair.name for pair in filled]
        batches.append((batch, request_targets(teacher, batch, names, cached, mesh)))
    return ScoredText([(batch, targets()) for batch, targets in batches], rows)


def _shapes_of(pairs: Sequence[ViewPair], config: Config) -> list[BatchShape]:
    """The padded shape of each batch of pairs; there are few different ones."""
    batches = [[batching.shape_of(pair) for pair in part] for part, _ in _in_batches(pairs, config)]
    needs = [batching.longest(batch) for batch in batches]
    chosen = batching.choose_shapes(needs, config.data.bucket_lengths)
    return [BatchShape(*batching.smallest(chosen, need)) for need in needs]


def _in_batches(pairs: Sequence[ViewPair], config: Config) -> list[tuple[list[ViewPair], int]]:
    """(pairs of a batch, how many of them are no repetitions of the last one)."""
    rows = config.eval.batch_size
    parts = [pairs[start : start + rows] for start in range(0, len(pairs), rows)]
    return [([*part, *[part[-1]] * (rows - len(part))], len(part)) for part in parts]
