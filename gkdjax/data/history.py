"""A conversation bakes its own history: what was said before is the prefix of what comes next."""

import dataclasses
from collections.abc import Sequence

from absl import logging

from gkdjax.errors import UserError
from gkdjax.types import Example, Message


def history_as_prefix(
    examples: Sequence[Example], key: str, *, last_only: bool = False
) -> list[Example]:
    """One Example for each of the assistant's turns; rows with a prefix stay as they are.

    `u1 a1 u2 a2` becomes prefix () + turns u1 + response a1, and prefix u1 a1 + turns u2 +
    response a2. So the teacher reads everything before a1 and a2, and the student the last
    `student_retained_turns` messages of the prefix and always the message that is answered. A
    system message is part of the history. If the assistant has to write the last turn, so it has
    here. Messages by the assistant that follow on each other stay in one Example.

    Args:
      examples: as read; their `row_id` is given anew.
      key: of the config, for the log.
      last_only: the last turn of each row only, for prompts of the evaluation.

    Raises:
      UserError: a conversation begins with the assistant; it names the row.
    """
    made: list[Example] = []
    for example in examples:
        parts = [example] if example.prefix else _turns_of(example)
        for part in parts[-1:] if last_only else parts:
            made.append(dataclasses.replace(part, row_id=len(made)))
    logging.info("%s: %d rows, as %d turns with their history", key, len(examples), len(made))
    return made


def _turns_of(example: Example) -> list[Example]:
    said = list(example.turns)
    if example.response is not None:
        said.append(Message("assistant", example.response))
    if said[0].role == "assistant":
        raise UserError(
            f"{example.name}: context.history_as_prefix: the first message is the assistant's and"
            " answers nothing; remove it, or give the row prefix_messages"
        )
    # Each part is a stretch of other roles and the assistant's messages that answer it.
    ends = [
        i
        for i in range(1, len(said) + 1)
        if i == len(said) or (said[i - 1].role == "assistant" and said[i].role != "assistant")
    ]
    parts = []
    for start, end in zip([0, *ends], ends, strict=False):
        answered = said[end - 1].role == "assistant"
        turns = said[start : end - 1] if answered else said[start:end]
        history = start + _leading_system(turns)
        parts.append(
            dataclasses.replace(
                example,
                name=f"{example.name}[{end - 1 if answered else end}]",
                prefix=tuple(said[:history]),
                turns=tuple(turns[history - start :]),
                response=said[end - 1].content if answered else None,
            )
        )
    return parts if len(parts) > 1 else [dataclasses.replace(parts[0], name=example.name)]


def _leading_system(turns: Sequence[Message]) -> int:
    """How many messages instruct rather than ask; at least one message is left to be answered."""
    others = (i for i, message in enumerate(turns) if message.role != "system")
    return next(others, len(turns) - 1)
