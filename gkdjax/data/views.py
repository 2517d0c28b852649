"""One example -> what the teacher reads and what the student reads, with the same targets.

teacher = prefix + turns + response, student = last retained prefix messages + turns + response.
The one-token shift is made here and nowhere else: position `at[n]` predicts target n, which stands
at `at[n] + 1`.
"""

import enum
from collections.abc import Sequence

import jax
import numpy as np

from gkdjax.data.chat import Chat
from gkdjax.errors import UserError
from gkdjax.types import Example, KeptTopK, Message, Trajectory, View, ViewPair


class Fate(enum.Enum):
    """What became of a row; callers count and name all but KEPT."""

    KEPT = "kept"
    TRUNCATED = "truncated"  # it lost targets at its end
    DROPPED = "dropped"  # too long
    EMPTY = "empty"  # its response has no token
    UNMATCHED = "unmatched"  # its response does not have trajectory.target_content_pattern


def prompts(
    example: Example,
    student_chat: Chat,
    teacher_chat: Chat,
    retained: int,
) -> tuple[np.ndarray, np.ndarray]:
    """What (student, teacher) read before they write the response: int32 [S], int32 [T].

    Raises:
      UserError: a chat template refuses, drops or rewrites a message.
    """
    seen = _retained(example.prefix, retained) + example.turns
    return (
        student_chat.prompt_ids(seen, f"{example.name}, student's view"),
        teacher_chat.prompt_ids(example.prefix + example.turns, f"{example.name}, teacher's view"),
    )


def view_pair(
    example: Example,
    student_chat: Chat,
    teacher_chat: Chat,
    *,
    retained: int,
    target_roles: Sequence[str],
    trajectory: Trajectory | None,
    max_length: int,
    too_long: str,
) -> tuple[ViewPair | None, Fate]:
    """Both views of a row, and what became of it.

    Targets are content and end-of-turn tokens of the turns and of the response whose role is in
    `target_roles`; nothing of the prefix ever is. Tokens after the last target are left out: no
    prediction depends on them.

    Args:
      retained: this many messages at the end of the prefix are read by the student too; more than
        there are keeps all.
      trajectory: the response as ids, put after the generation prompt as they are; it replaces
        `example.response`. If unfinished it has no end-of-turn token, and so no target for it.
      max_length: of the longer view.
      too_long: "drop", or "truncate": both views lose as many tokens at their end as the longer
        one has too many; a row that is left without a target is dropped all the same.

    Returns:
      (pair, KEPT or TRUNCATED) or (None, DROPPED).

    Raises:
      UserError: no target token, or not the same ones in both views; and all that `Chat.render`
        raises. It names the row.
    """
    student = _view(
        f"{example.name}, student's view",
        student_chat,
        _retained(example.prefix, retained),
        example,
        target_roles,
        trajectory,
    )
    teacher = _view(
        f"{example.name}, teacher's view",
        teacher_chat,
        example.prefix,
        example,
        target_roles,
        trajectory,
    )
    target_ids = _target_ids(student)
    if not np.array_equal(target_ids, _target_ids(teacher)):
        raise UserError(
            f"{example.name}: the target tokens differ between the student's view and the "
            "teacher's: their tokenizers or chat templates write the same messages differently"
        )
    if len(target_ids) == 0:
        raise UserError(
            f"{example.name}: no target tokens: it has no message of the roles "
            f"{', '.join(target_roles)} to train on"
        )
    kept = None
    if trajectory is not None and isinstance(trajectory.kept, KeptTopK):
        # Of use where the targets are the response and nothing else.
        kept = trajectory.kept if np.array_equal(target_ids, trajectory.ids) else None
    pair = ViewPair(example.name, example.row_id, student, teacher, target_ids, kept)
    return _fit(pair, max_length, too_long)


def _retained(prefix: tuple[Message, ...], count: int) -> tuple[Message, ...]:
    return prefix[-count:] if count else ()  # prefix[-0:] would be all of it


def _view(
    name: str,
    chat: Chat,
    prefix: tuple[Message, ...],
    example: Example,
    target_roles: Sequence[str],
    trajectory: Trajectory | None,
) -> View:
    messages = prefix + example.turns
    is_target = [False] * len(prefix) + [turn.role in target_roles for turn in example.turns]
    answer_is_target = "assistant" in target_roles
    if trajectory is not None:
        ids, flags = chat.render(messages, is_target, name, generation_prompt=True)
        ids = np.concatenate([ids, np.asarray(trajectory.ids, np.int32)])
        flags = np.concatenate([flags, np.full(len(trajectory.ids), answer_is_target)])
    elif example.response is not None:
        answer = Message("assistant", example.response)
        ids, flags = chat.render((*messages, answer), [*is_target, answer_is_target], name)
    else:
        ids, flags = chat.render(messages, is_target, name)
    targets = np.flatnonzero(flags)
    if targets.size and targets[0] == 0:
        raise UserError(f"{name}: the first token of all is a target, and nothing predicts it")
    length = targets[-1] + 1 if targets.size else len(ids)
    return View(ids[:length], (targets - 1).astype(np.int32))


def _target_ids(view: View) -> np.ndarray:
    return view.ids[view.at + 1]


def _fit(pair: ViewPair, max_length: int, too_long: str) -> tuple[ViewPair | None, Fate]:
    excess = max(len(pair.student.ids), len(pair.teacher.ids)) - max_length
    if excess <= 0:
        return pair, Fate.KEPT
    if too_long == "drop":
        return None, Fate.DROPPED
    views = (pair.student, pair.teacher)
    kept = min(int((view.at + 1 < len(view.ids) - excess).sum()) for view in views)
    if kept == 0:
        return None, Fate.DROPPED
    student, teacher = (View(view.ids[:-excess], view.at[:kept]) for view in views)
    said = None if pair.kept is None else jax.tree.map(lambda x: x[:kept], pair.kept)
    cut = ViewPair(pair.name, pair.row_id, student, teacher, pair.target_ids[:kept], said)
    return cut, Fate.TRUNCATED
