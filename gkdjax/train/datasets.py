"""Builds the datasets of a run: rows to train, to anchor, and to measure the loss on."""

import dataclasses
import pathlib

from absl import logging

from gkdjax.config import Config, anchor_sets
from gkdjax.data import truncation
from gkdjax.data.dataset import DistillDataset
from gkdjax.data.examples import BadRows
from gkdjax.data.load import Examples
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


def build(
    config: Config,
    key: str,
    examples: list[Example],
    rules: ViewRules,
    batch_size: int,
    contexts: dict[str, ContextLimit],
    bad_rows: BadRows,
    per_prompt: int | None = None,
) -> DistillDataset:
    """Builds one dataset, with its rows as they will be read.

    Args:
      key: of the dataset, as "data.train".
      contexts: from `contexts_of`.
      bad_rows: takes the rows that the chat template refuses.
      per_prompt: responses to a row without one; None: `rollout.per_prompt`.

    Raises:
      UserError: rows that do not fit, named.
    """
    c = config.rollout
    off_policy = key != "data.train" or needs_teacher_text(config.gkd)  # rows as they stand
    how = {"per_prompt": per_prompt or c.per_prompt, "own_responses": off_policy}
    dataset = DistillDataset(config, key, examples, rules, batch_size, bad_rows, **how)
    room = "rollout.max_new_tokens", c.max_new_tokens
    rows = dataset.examples()
    truncation.require_contexts(rows, rules, room, contexts, teacher_writes=off_policy)
    return dataset


def anchor_targets(config: Config, anchors: dict[str, list[Example]]) -> TargetRules:
    """Returns whose messages of an anchor are targets; the pattern is for what is being taught."""
    roles = {"assistant"}
    if config.anchor.tokens == "all":
        roles |= {turn.role for rows in anchors.values() for row in rows for turn in row.turns}
        roles -= {*TOOL_ROLES}
    return TargetRules(tuple(sorted(roles)))


def build_anchors(
    config: Config,
    anchors: dict[str, list[Example]],
    rules: ViewRules,
    sources: Sources,
    contexts: dict[str, ContextLimit],
    bad_rows: BadRows,
) -> dict[str, DistillDataset]:
    """Builds the anchors by name, see `config.anchor_sets`; {} without one."""
    if not anchors:
        return {}
    chat = sources.teacher_chat
    if config.anchor.reference == "base":
        chat = sources.chat
        contexts = contexts_of(config, dataclasses.replace(sources, teacher=None), None)
    targets = anchor_targets(config, anchors)
    rules = dataclasses.replace(rules, teacher_chat=chat, retained=0, targets=targets)
    size = config.anchor.batch_size
    return {
        of.name: build(config, of.key, anchors[of.name], rules, size, contexts, bad_rows)
        for of in anchor_sets(config.anchor)
    }


def build_validation(
    config: Config,
    examples: Examples,
    rules: ViewRules,
    contexts: dict[str, ContextLimit],
    can: Capabilities,
    bad_rows: BadRows,
) -> DistillDataset | None:
    """Builds the first `eval.rows` rows; None without any, or if the teacher cannot read them."""
    rows, most = examples.validation, config.eval.rows
    if not rows:
        return None
    if len(rows) > most:
        logging.info("data.validation: the first %d of %d rows (eval.rows)", most, len(rows))
    how = config.eval.batch_size, contexts, bad_rows
    dataset = build(config, "data.validation", rows[:most], rules, *how, per_prompt=1)
    return None if dataset.needs_scores() and not can.scores else dataset
