"""A conversation in parts: each answer a row of its own.

Everything before an answer becomes its prefix (`history_as_prefix`: a conversation bakes its own
history), or is read by both models (`split_answers`).
"""

import dataclasses
import itertools
from collections.abc import Sequence

from absl import logging

from gkdjax.data.examples import BadRows
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.row_schema import TOOL_ROLES, leading_system
from gkdjax.data.template import is_plain
from gkdjax.data.views import ViewRules
from gkdjax.types import Example, Message
from gkdjax.utils.errors import UserError


def history_as_prefix(
    examples: Sequence[Example],
    key: str,
    roles: Sequence[str],
    bad_rows: BadRows,
    *,
    last_only: bool = False,
) -> list[Example]:
    """One Example for each of the assistant's turns; rows with a prefix stay as they are.

    `u1 a1 u2 a2` becomes prefix () + turns u1 + response a1, and prefix u1 a1 + turns u2 +
    response a2. A system message is part of the history. Messages by the assistant that follow each
    other, with the results of tools, stay in one Example. Answers that are not to be learnt
    (`Message.learn`, `Example.given`, other `roles`) are history alone.

    All get new `row_id`s. If `last_only`, there is only the last turn of each row, for prompts of
    the evaluation. `bad_rows` takes in conversations that begin with the assistant.
    """
    made: list[Example] = []
    for example in examples:
        with bad_rows.row(example.name):
            parts = [example] if example.prefix else _turns_with_history(example)
            learnt = [p for p in parts if p.answer is None or _has_target(p, roles)]
            parts = parts[-1:] if last_only or not learnt else learnt
            made += [dataclasses.replace(p, row_id=len(made) + i) for i, p in enumerate(parts)]
    bad_rows.settle(key, key, len(made))
    logging.info("%s: %d rows, as %d turns with their history", key, len(examples), len(made))
    return made


def split_answers(examples: Sequence[Example], key: str, rules: ViewRules) -> Sequence[Example]:
    """One Example for each answer that is a target, if a chat template needs that.

    All rows are split if a template treats the last answer of a conversation apart
    (`Chat.earlier_answers` is false), else those whose thoughts, tools or calls a template writes
    in another way once more is said after them. Then all rows get new `row_id`s.
    """
    apart = not all(chat.earlier_answers for chat in (rules.student_chat, rules.teacher_chat))
    parts_of = []
    for example in examples:
        parts = [example] if is_plain(example) and not apart else answers_of(example, rules.targets)
        whole = not apart and (len(parts) == 1 or rules.learns_at_once(example, parts))
        parts_of.append([example] if whole else parts)
    parts = list(itertools.chain(*parts_of))
    if len(parts) > len(examples):
        logging.info(
            "%s: %d rows, as %d with one answer each: the chat template writes the last answer of"
            " a conversation in another way than those before it",
            *(key, len(examples), len(parts)),
        )
    elif not apart:
        return examples
    return [dataclasses.replace(part, row_id=row_id) for row_id, part in enumerate(parts)]


def answers_of(example: Example, targets: TargetRules) -> list[Example]:
    """An Example for each answer that is a target, with everything before it as given turns.

    Each target of a row is a target of one of them; a row whose only answer ends it stays as it is.
    """
    messages, turns = _messages(example), len(example.turns)
    learnt = [*targets.of_turns(example), *map(targets.of_message, messages[turns:])]
    ends = [i + 1 for i in range(turns) if messages[i].role == "assistant" and learnt[i]]
    # And the rest, if it has targets of its own, or somebody has to answer it.
    if not ends or example.answer is None or any(learnt[ends[-1] :]):
        ends.append(len(messages))
    if ends == [len(messages)]:
        return [example]
    return [
        dataclasses.replace(_part(example, 0, end), given=max(example.given, given))
        for given, end in itertools.pairwise([0, *ends])
    ]


def _messages(example: Example) -> tuple[Message, ...]:
    return example.turns + (() if example.answer is None else (example.answer,))


def _has_target(part: Example, roles: Sequence[str]) -> bool:
    return any(m.learn and m.role in roles for m in _messages(part)[part.given :])


def _part(example: Example, start: int, end: int) -> Example:
    """The messages [start:end]; if the last of them is the assistant's, it is the response."""
    messages = _messages(example)[start:end]
    answered = messages[-1].role == "assistant"
    return dataclasses.replace(
        example,
        name=f"{example.name}[{end - answered}]",
        turns=messages[: len(messages) - answered],
        answer=messages[-1] if answered else None,
    )


def _turns_with_history(example: Example) -> list[Example]:
    messages, parts = _messages(example), []
    if messages[0].role == "assistant":
        raise UserError(
            f"{example.name}: context.history_as_prefix: the first message is the assistant's and"
            " answers nothing; remove it, or give the row prefix_messages"
        )
    # A part is a stretch of other roles and the assistant's messages that answer it, with what
    # tools have answered to these.
    ends = [
        i
        for i, (before, after) in enumerate(itertools.pairwise(messages), start=1)
        if before.role == "assistant" and after.role not in ("assistant", *TOOL_ROLES)
    ]
    for start, end in itertools.pairwise([0, *ends, len(messages)]):
        part = _part(example, start, end)
        system = min(leading_system(part.turns), len(part.turns) - 1)  # one is left to be answered
        given = max(0, min(example.given, end) - start - system)
        prefix, turns = messages[: start + system], part.turns[system:]
        parts.append(dataclasses.replace(part, prefix=prefix, turns=turns, given=given))
    return parts if len(parts) > 1 else [dataclasses.replace(parts[0], name=example.name)]
