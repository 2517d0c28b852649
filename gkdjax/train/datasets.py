"""The streams of a run's rows: to be trained, to anchor it, and to measure its loss on."""

import dataclasses
import pathlib

from absl import logging

from gkdjax.config import Config, anchor_sets
from gkdjax.data import truncation
from gkdjax.data.bad_rows import BadRows
from gkdjax.data.chat_template import Chat
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
    """The student's name, and then the teacher's -> what it can read."""
    student = _limit_of(sources.student)
    found = {f"the student ({config.student.model})": student}
    if teacher is not None:
        return found | {f"the teacher ({teacher.description})": hooks(teacher).context}
    if sources.teacher is None:
        return found | {"the teacher (the student's base)": student}
    return found | {f"the teacher ({config.teacher.model})": _limit_of(sources.teacher)}


def _limit_of(directory: pathlib.Path) -> ContextLimit:
    spec = model_config.load_spec(directory)
    return ContextLimit(
        spec.context_length, f"max_position_embeddings in config.json of {directory}"
    )


def one_feed(
    config: Config,
    key: str,
    examples: list[Example],
    rules: ViewRules,
    batch_size: int,
    contexts: dict[str, ContextLimit],
    bad_rows: BadRows,
    per_prompt: int | None = None,
) -> DistillDataset:
    """One stream, with its rows as they will be read.

    Args:
      config: of the run.
      key: of the stream, as "data.train".
      examples: its rows.
      rules: of its views.
      batch_size: rows of a batch.
      contexts: of `contexts_of`.
      bad_rows: what becomes of rows that the chat template cannot take.
      per_prompt: responses to a row without one; None: `rollout.per_prompt`.

    Raises:
      UserError: rows that do not fit, named.
    """
    c = config.rollout
    if not all(chat.earlier_answers for chat in (rules.student_chat, rules.teacher_chat)):
        examples = answers_apart(examples, key, rules.targets)
    elif divided := {example for example in examples if _is_divided(example, rules)}:
        examples = answers_apart(examples, key, rules.targets, divided.__contains__)
    of_rows = key != "data.train" or needs_teacher_text(config.gkd)  # are trained as they stand
    rendered = _rendered(key, examples, rules, bad_rows, responses=of_rows)
    examples = [one.example for one in rendered]
    truncation.require_room_beside_prefix(key, examples, rules, config.context)
    feed = DistillDataset(
        key,
        examples,
        rules,
        RolloutFilter(rules.targets, c.max_retries, c.max_new_tokens, rules.teacher_chat.shared),
        per_prompt=per_prompt or c.per_prompt,
        # Rows of one length may be of one kind of task; an anchor's batch is to hold of every kind.
        most_padding=_MOST_PADDING if key == "data.train" else 1.0,
        batch_size=batch_size,
        allowed_lengths=config.data.bucket_lengths,
        seed=config.train.seed,
        rendered=rendered,
        unusable=bad_rows.dropped.get(key) or (),
    )
    truncation.require_contexts(
        feed.rows(),
        rules,
        ("rollout.max_new_tokens", c.max_new_tokens),
        contexts,
        teacher_writes=key != "data.train" or needs_teacher_text(config.gkd),
    )
    return feed


def _is_divided(example: Example, rules: ViewRules) -> bool:
    """Whether a row with thoughts, tools or calls has to be learnt answer by answer."""
    parts = [example] if is_plain(example) else answers_of(example, rules.targets)
    return len(parts) > 1 and not rules.learns_at_once(example, parts)


def _rendered(
    key: str, examples: list[Example], rules: ViewRules, bad_rows: BadRows, *, responses: bool
) -> list[Rendered]:
    """The rows that the chat templates take.

    Raises:
      UserError: there are others, and they are not to be dropped.
    """
    found = []
    for example in examples:
        with bad_rows.row(example.name):
            found.append(Rendered.of(example, rules, response=responses))
    bad_rows.settle(key, key, len(found))
    return found


def _anchor_rules(
    config: Config, rules: ViewRules, teacher_chat: Chat, anchors: dict[str, list[Example]]
) -> ViewRules:
    roles = {"assistant"}
    if config.anchor.tokens == "all":
        roles |= {turn.role for rows in anchors.values() for row in rows for turn in row.turns}
        roles -= {*TOOL_ROLES}
    # The pattern is for what is being taught; the anchor's text may be about anything.
    return dataclasses.replace(
        rules,
        teacher_chat=teacher_chat,
        retained=0,
        targets=TargetRules(tuple(sorted(roles))),
    )


def anchor_feeds(
    config: Config,
    examples: Examples,
    rules: ViewRules,
    sources: Sources,
    contexts: dict[str, ContextLimit],
    bad_rows: BadRows,
) -> dict[str, DistillDataset]:
    """By name, see `config.anchor_sets`; {} without an anchor. Arguments as for `one_feed`."""
    if not examples.anchors:
        return {}
    teacher_chat = sources.teacher_chat
    if config.anchor.reference == "base":
        teacher_chat = sources.chat
        contexts = contexts_of(config, dataclasses.replace(sources, teacher=None), None)
    rules = _anchor_rules(config, rules, teacher_chat, examples.anchors)
    rows = config.anchor.batch_size
    return {
        of.name: one_feed(
            config, of.key, examples.anchors[of.name], rules, rows, contexts, bad_rows
        )
        for of in anchor_sets(config.anchor)
    }


def validation_feed(
    config: Config,
    examples: Examples,
    rules: ViewRules,
    contexts: dict[str, ContextLimit],
    can: Capabilities,
    bad_rows: BadRows,
) -> DistillDataset | None:
    """The first `eval.rows` of them; None if there are none, or the teacher cannot read them."""
    rows, most = examples.validation, config.eval.rows
    if not rows:
        return None
    if len(rows) > most:
        logging.info("data.validation: the first %d of %d rows (eval.rows)", most, len(rows))
    batch = config.eval.batch_size
    feed = one_feed(
        config, "data.validation", rows[:most], rules, batch, contexts, bad_rows, per_prompt=1
    )
    return None if feed.needs_scores() and not can.scores else feed
