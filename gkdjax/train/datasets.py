"""Builds the datasets of a run: rows to train, to anchor, and to measure the loss on."""

import dataclasses
import pathlib
from typing import NamedTuple

from absl import logging

from gkdjax.config import Config, anchor_sets
from gkdjax.data import truncation
from gkdjax.data.dataset import DistillDataset
from gkdjax.data.examples import BadRows
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.row_schema import TOOL_ROLES
from gkdjax.data.views import ViewRules
from gkdjax.models.hf import model_config
from gkdjax.rollout.schedule import needs_teacher_text
from gkdjax.teachers.base import Capabilities, Teacher, hooks
from gkdjax.train.models import Sources
from gkdjax.types import ContextLimit, Example


def contexts_of(
    config: Config, sources: Sources, teacher: Teacher | None
) -> dict[str, ContextLimit]:
    """Returns the context lengths of the student and then of the teacher, by their names."""

    def limit(directory: pathlib.Path) -> ContextLimit:
        length = model_config.load_spec(directory).context_length
        return ContextLimit(length, f"max_position_embeddings in config.json of {directory}")

    student = limit(sources.student)
    if teacher is not None:
        name, found = teacher.description, hooks(teacher).context
    elif sources.teacher is None:
        name, found = "the student's base", student
    else:
        name, found = config.teacher.model, limit(sources.teacher)
    return {f"the student ({config.student.model})": student, f"the teacher ({name})": found}


class DatasetBuilder(NamedTuple):
    """Builds the datasets of a run, with their rows as they will be read."""

    config: Config
    rules: ViewRules
    contexts: dict[str, ContextLimit]  # from `contexts_of`
    bad_rows: BadRows  # takes the rows that the chat template refuses

    def build(
        self, key: str, examples: list[Example], batch_size: int, per_prompt: int | None = None
    ) -> DistillDataset:
        """Builds one dataset, as that of "data.train"; UserError for rows that do not fit.

        `per_prompt` responses are written to a row without one; None: `rollout.per_prompt`.
        """
        c = self.config
        off_policy = key != "data.train" or needs_teacher_text(c.gkd)  # rows as they stand
        how = {"per_prompt": per_prompt or c.rollout.per_prompt, "own_responses": off_policy}
        given = c, key, examples, self.rules, batch_size, self.bad_rows
        dataset = DistillDataset(*given, **how)
        self.require_room("rollout", dataset.examples(), teacher_writes=off_policy)
        return dataset

    def require_room(self, section: str, rows: list[Example], *, teacher_writes: bool) -> None:
        """Raises UserError for a row that the models cannot read with SECTION.max_new_tokens."""
        room = f"{section}.max_new_tokens", getattr(self.config, section).max_new_tokens
        truncation.require_contexts(
            rows, self.rules, room, self.contexts, teacher_writes=teacher_writes
        )

    def anchors(
        self, anchors: dict[str, list[Example]], sources: Sources
    ) -> dict[str, DistillDataset]:
        """Builds the anchors by name, see `config.anchor_sets`; {} without one."""
        c, chat, contexts = self.config, sources.teacher_chat, self.contexts
        if c.anchor.reference == "base":
            chat = sources.chat
            contexts = contexts_of(c, dataclasses.replace(sources, teacher=None), None)
        targets = anchor_targets(c, anchors)
        rules = dataclasses.replace(self.rules, teacher_chat=chat, retained=0, targets=targets)
        of_anchors = self._replace(rules=rules, contexts=contexts)
        return {
            each.name: of_anchors.build(each.key, anchors[each.name], c.anchor.batch_size)
            for each in anchor_sets(c.anchor)
        }

    def validation(self, rows: list[Example], can: Capabilities) -> DistillDataset | None:
        """Builds the first `eval.rows` rows; None without any, or if no teacher can read them."""
        most = self.config.eval.rows
        if not rows:
            return None
        if len(rows) > most:
            logging.info("data.validation: the first %d of %d rows (eval.rows)", most, len(rows))
        batch_size = self.config.eval.batch_size
        dataset = self.build("data.validation", rows[:most], batch_size, per_prompt=1)
        return None if dataset.needs_scores() and not can.scores else dataset


def anchor_targets(config: Config, anchors: dict[str, list[Example]]) -> TargetRules:
    """Returns whose messages of an anchor are targets; the pattern is for what is being taught."""
    roles = {"assistant"}
    if config.anchor.tokens == "all":
        roles |= {turn.role for rows in anchors.values() for row in rows for turn in row.turns}
        roles -= {*TOOL_ROLES}
    return TargetRules(tuple(sorted(roles)))
