"""A conversation in parts: each answer a row of its own.

What was said before is the prefix of what comes next (a conversation bakes its own history), or is
read by both.
"""

import dataclasses
from collections.abc import Callable, Sequence

from absl import logging

from gkdjax.data.bad_rows import BadRows
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.row_schema import TOOL_ROLES
from gkdjax.types import Example, Message
from gkdjax.utils.errors import UserError


def history_as_prefix(
    examples: Sequence[Example],
    key: str,
    roles: Sequence[str] = ("assistant",),
    bad_rows: BadRows | None = None,
    *,
    last_only: bool = False,
) -> list[Example]:
    """One Example for each of the assistant's turns; rows with a prefix stay as they are.

    `u1 a1 u2 a2` becomes prefix () + turns u1 + response a1, and prefix u1 a1 + turns u2 +
    response a2. So the teacher reads everything before a1 and a2, and the student the last
    `student_retained_turns` messages of the prefix and always the message that is answered. A
    system message is part of the history. If the assistant has to write the last turn, so it has
    here. Messages by the assistant that follow on each other stay in one Example. Answers that are
    not to be learnt (`Message.learn`, `Example.given`) are history alone.

    Args:
      examples: as read; their `row_id` is given anew.
      key: of the config, for the log.
      roles: `context.target_roles`.
      bad_rows: what becomes of rows that cannot be used; None: they are refused.
      last_only: the last turn of each row only, for prompts of the evaluation.

    Raises:
      UserError: a conversation begins with the assistant; it names the row.
    """
    made: list[Example] = []
    bad_rows = BadRows() if bad_rows is None else bad_rows
    for example in examples:
        with bad_rows.row(example.name):
            parts = [example] if example.prefix else _turns_of(example)
            wanted = [p for p in parts if p.answer is None or _teaches(p, roles)]
            parts = parts[-1:] if last_only or not wanted else wanted
            made += [dataclasses.replace(p, row_id=len(made) + i) for i, p in enumerate(parts)]
    bad_rows.settle(key, key, len(made))
    logging.info("%s: %d rows, as %d turns with their history", key, len(examples), len(made))
    return made


def answers_apart(
    examples: Sequence[Example],
    key: str,
    targets: TargetRules,
    divided: Callable[[Example], bool] = lambda _: True,
) -> list[Example]:
    """One Example for each answer that is a target, with everything before it as given turns.

    For chat templates that treat the last answer apart (`Chat.earlier_answers` is false), or its
    thoughts and calls. Each target of a row is a target of one of its Examples; a row with one at
    its end stays as it is.

    Args:
      examples: as they are to be trained; their `row_id` is given anew.
      key: of the config, for the log.
      targets: which messages are.
      divided: the rows that are; others stay as they are.
    """
    made: list[Example] = []
    for example in examples:
        for part in answers_of(example, targets) if divided(example) else [example]:
            made.append(dataclasses.replace(part, row_id=len(made)))
    if len(made) > len(examples):
        logging.info(
            "%s: %d rows, as %d with one answer each: the chat template writes the last answer of"
            " a conversation in another way than those before it",
            *(key, len(examples), len(made)),
        )
    return made


def answers_of(example: Example, targets: TargetRules) -> list[Example]:
    """The Examples that `answers_apart` makes of one; itself, if nothing is to be divided."""
    said = _said(example)
    learnt = [*targets.of_turns(example), *map(targets.of_message, said[len(example.turns) :])]
    ends = [
        i + 1
        for i, message in enumerate(said)
        if i < len(example.turns) and message.role == "assistant" and learnt[i]
    ]
    # And the rest, if it has targets of its own, or somebody has to answer it.
    if not ends or example.answer is None or any(learnt[ends[-1] :]):
        ends.append(len(said))
    if ends == [len(said)]:
        return [example]
    return [
        dataclasses.replace(_part(example, said, 0, end), given=max(example.given, given))
        for given, end in zip([0, *ends], ends, strict=False)
    ]


def _said(example: Example) -> list[Message]:
    answer = () if example.answer is None else (example.answer,)
    return [*example.turns, *answer]


def _part(example: Example, said: Sequence[Message], start: int, end: int) -> Example:
    """said[start:end]; if the assistant has the last word in it, that is the response."""
    answered = said[end - 1].role == "assistant"
    return dataclasses.replace(
        example,
        name=f"{example.name}[{end - 1 if answered else end}]",
        turns=tuple(said[start : end - answered]),
        answer=said[end - 1] if answered else None,
    )


def _turns_of(example: Example) -> list[Example]:
    said = _said(example)
    if said[0].role == "assistant":
        raise UserError(
            f"{example.name}: context.history_as_prefix: the first message is the assistant's and"
            " answers nothing; remove it, or give the row prefix_messages"
        )
    # Each part is a stretch of other roles and the assistant's messages that answer it, with what
    # tools have answered to these.
    ends = [
        i
        for i in range(1, len(said) + 1)
        if i == len(said)
        or (said[i - 1].role == "assistant" and said[i].role not in ("assistant", *TOOL_ROLES))
    ]
    parts = []
    for start, end in zip([0, *ends], ends, strict=False):
        part = _part(example, said, start, end)
        history = start + _leading_system(part.turns)
        parts.append(
            dataclasses.replace(
                part,
                prefix=tuple(said[:history]),
                turns=part.turns[history - start :],
                given=max(0, min(example.given, end) - history),
            )
        )
    return parts if len(parts) > 1 else [dataclasses.replace(parts[0], name=example.name)]


def _teaches(part: Example, roles: Sequence[str]) -> bool:
    """Whether it has a message to learn."""
    said = _said(part)[part.given :]
    return any(message.learn and message.role in roles for message in said)


def _leading_system(turns: Sequence[Message]) -> int:
    """How many messages instruct rather than ask; at least one message is left to be answered."""
    others = (i for i, message in enumerate(turns) if message.role != "system")
    return next(others, len(turns) - 1)
