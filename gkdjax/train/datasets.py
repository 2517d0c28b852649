"""Builds the datasets of a run: rows to train, to anchor, and to measure the loss on."""

import dataclasses
import pathlib

from absl import logging

from gkdjax.config import Config, anchor_sets
from gkdjax.data import truncation
from gkdjax.data.bad_rows import BadRows
from gkdjax.data.conversations import answers_apart, answers_of
from gkdjax.data.dataset import DistillDataset, Rendered, RolloutFilter
from gkdjax.data.load import Examples
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.message_spans import is_plain
from gkdjax.data.row_schema import TOOL_ROLES
from gkdjax.data.views import ViewRules
from gkdjax.models.hf import model_config
from gkdjax.rollout.schedule import needs_teacher_text
from gkdjax.teachers.base import Capabilities, Teacher, hooks
from gkdjax.train.models import Sources
from gkdjax.types import ContextLimit, Example

_MOST_PADDING = 0.2  # of either view; with more, rows of data.train share batches by length


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
    if not all(chat.earlier_answers for chat in (rules.student_chat, rules.teacher_chat)):
        examples = answers_apart(examples, key, rules.targets)
    elif divided := {example for example in examples if _is_divided(example, rules)}:
        examples = answers_apart(examples, key, rules.targets, divided.__contains__)
    off_policy = key != "data.train" or needs_teacher_text(config.gkd)  # rows as they stand
    rendered = []
    for example in examples:
        with bad_rows.row(example.name):
            rendered.append(Rendered.of(example, rules, response=off_policy))
    bad_rows.settle(key, key, len(rendered))
    examples = [one.example for one in rendered]
    truncation.require_room_beside_prefix(key, examples, rules, config.context)
    dataset = DistillDataset(
        key,
        examples,
        rules,
        RolloutFilter(rules.targets, c.max_retries, c.max_new_tokens, rules.teacher_chat.shared),
        per_prompt=per_prompt or c.per_prompt,
        # Rows of one length may be of one kind of task; an anchor's batch has to hold every kind.
        most_padding=_MOST_PADDING if key == "data.train" else 1.0,
        batch_size=batch_size,
        allowed_lengths=config.data.bucket_lengths,
        seed=config.train.seed,
        rendered=rendered,
        unusable=bad_rows.dropped.get(key) or (),
    )
    room = "rollout.max_new_tokens", c.max_new_tokens
    rows = dataset.rows()
    truncation.require_contexts(rows, rules, room, contexts, teacher_writes=off_policy)
    return dataset


def _is_divided(example: Example, rules: ViewRules) -> bool:
    """Whether a row with thoughts, tools or calls has to be learnt answer by answer."""
    parts = [example] if is_plain(example) else answers_of(example, rules.targets)
    return len(parts) > 1 and not rules.learns_at_once(example, parts)


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
