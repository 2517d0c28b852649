"""Makes of one example what the teacher reads and what the student reads, with the same targets.

teacher = prefix + turns + response, student = last retained prefix messages + turns + response.
The one-token shift is made here and nowhere else: position `at[n]` predicts target n, which stands
at `at[n] + 1`.
"""

import dataclasses
import enum
import itertools
from collections.abc import Sequence

import jax
import numpy as np

from gkdjax.data.chat_template import Chat
from gkdjax.data.loss_mask import TargetRules
from gkdjax.losses.topk import TokenTopK
from gkdjax.types import Completion, Example, Message, View, ViewPair
from gkdjax.utils.errors import UserError


class RowStatus(enum.Enum):
    """The outcome of a row; callers count and name all but KEPT."""

    KEPT = "kept"
    TRUNCATED = "truncated"  # it lost targets at its end
    SHORTENED = "shortened"  # it lost messages, or text, at its beginning or in its prefix
    DROPPED = "dropped"  # too long
    EMPTY = "empty"  # its response has no token
    UNUSABLE = "unusable"  # it cannot be read or rendered, and data.bad_rows="drop"
    UNMATCHED = "unmatched"  # nothing to be learnt from it has context.target_content_pattern


@dataclasses.dataclass(frozen=True)
class ViewRules:
    """How the rows of one stream become view pairs."""

    student_chat: Chat
    teacher_chat: Chat
    retained: int  # messages at the end of the prefix that the student reads too
    targets: TargetRules
    max_length: int  # of the longer view
    too_long: str  # as `data.too_long`; `truncation` has shortened beginnings and prefixes before

    def prompts(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Returns what (student, teacher) read before the response: int32 [S], int32 [T]."""
        student, teacher = (
            chat.prompt_ids(prefix + example.turns, name, example.tools)
            for name, chat, prefix in self._sides(example)
        )
        return student, teacher

    def before_targets(self, example: Example) -> np.ndarray:
        """Returns the teacher's prompt up to where its first target is predicted: int32 [n]."""
        _, teacher = self._sides(example)
        ids, flags = self._rendered(example, *teacher, respond=True)
        return ids[: flags.argmax()] if flags.any() else ids

    def lengths(self, example: Example) -> tuple[int, int]:
        """Returns the tokens of both views, or of the prompts where there is no response."""
        if example.answer is None:
            student, teacher = self.prompts(example)
            return len(student), len(teacher)
        student, teacher = self._views(example, None)
        return len(student.ids), len(teacher.ids)

    def learns_at_once(self, example: Example, parts: Sequence[Example]) -> bool:
        """Whether a row teaches what its parts would teach, each with one answer at its end.

        Some templates write thoughts, tools or calls differently where more follows them.
        """
        whole, apart = self._target_ids([example]), self._target_ids(parts)
        return whole is not None and apart in (None, whole)

    def _target_ids(self, examples: Sequence[Example]) -> list[list[int]] | None:
        """The target ids of rows in both views; None: a template refuses a row."""
        found: list[list[int]] = [[], []]
        try:
            for example in examples:
                for part, side in zip(found, self._sides(example), strict=True):
                    ids, flags = self._rendered(example, *side, respond=example.answer is None)
                    part += ids[flags].tolist()
        except UserError:
            return None
        return found

    def pair(
        self, example: Example, completion: Completion | None, *, too_long: str | None = None
    ) -> tuple[ViewPair | None, RowStatus]:
        """Makes both views of a row: (pair, KEPT or TRUNCATED) or (None, DROPPED or UNMATCHED).

        Nothing of the prefix is a target, and no given turn. A completion follows the generation
        prompt unchanged, instead of `example.answer`; an unfinished one has no end-of-turn target.
        Tokens after the last target are left out: no prediction depends on them. If a row is too
        long and not dropped, both views lose as many tokens at their end as the longer one has too
        many; a row without a target after that is dropped.

        Raises:
          UserError: no target token, or not the same in both views; or as `Chat.render`.
        """
        student, teacher = self._views(example, completion)
        target_ids, others = student.ids[student.at + 1], teacher.ids[teacher.at + 1]
        if not np.array_equal(target_ids, others):
            raise UserError(
                f"{example.name}: the target tokens differ between the student's view and the"
                " teacher's: their tokenizers or chat templates write the same messages differently"
                f"{self._difference(target_ids, others)}"
            )
        if len(target_ids) == 0:
            self._require_roles(example, completion)
            return None, RowStatus.UNMATCHED
        cached = self._cached(len(target_ids), completion)
        pair = ViewPair(example.name, example.row_id, student, teacher, target_ids, cached)
        excess = max(len(student.ids), len(teacher.ids)) - self.max_length
        if excess <= 0:
            return pair, RowStatus.KEPT
        left = min(int((v.at + 1 < len(v.ids) - excess).sum()) for v in (student, teacher))
        if left == 0 or (too_long or self.too_long) == "drop":
            return None, RowStatus.DROPPED
        pair = dataclasses.replace(
            pair,
            student=View(student.ids[:-excess], student.at[:left]),
            teacher=View(teacher.ids[:-excess], teacher.at[:left]),
            target_ids=target_ids[:left],
            cached=jax.tree.map(lambda x: x[:left], cached),
        )
        return pair, RowStatus.TRUNCATED

    def described(self, pair: ViewPair) -> str:
        """Describes a row for people: both views up to the first target, and all targets."""
        read = [
            f"the {who} reads {view.at[0] + 1} tokens, {_shown(chat, view.ids[: view.at[0] + 1])}"
            for who, chat, view in (
                ("student", self.student_chat, pair.student),
                ("teacher", self.teacher_chat, pair.teacher),
            )
        ]
        learnt = f"{len(pair.target_ids)} tokens, {_shown(self.student_chat, pair.target_ids)}"
        return f"{pair.name}: {'; '.join(read)}; learnt are {learnt}"

    def with_whole_responses(self) -> "ViewRules":
        targets = dataclasses.replace(self.targets, whole_responses=True)
        return dataclasses.replace(self, targets=targets)

    def _sides(self, example: Example) -> list[tuple[str, Chat, tuple[Message, ...]]]:
        """(name for errors, chat, prefix that is read) of the student and of the teacher."""
        seen = example.prefix[-self.retained :] if self.retained else ()
        return [
            (f"{example.name}, student's view", self.student_chat, seen),
            (f"{example.name}, teacher's view", self.teacher_chat, example.prefix),
        ]

    def _rendered(self, example: Example, name: str, chat: Chat, prefix, *, respond: bool):
        """(ids, flags) of a row with its own answer, or up to where a response has to begin."""
        messages = prefix + example.turns
        learnt = (False,) * len(prefix) + self.targets.of_turns(example)
        if example.answer is not None and not respond:
            messages += (example.answer,)
            learnt += (self.targets.of_message(example.answer),)
        return chat.render(messages, learnt, name, generation_prompt=respond, tools=example.tools)

    def _views(self, example: Example, completion: Completion | None) -> tuple[View, View]:
        student, teacher = self._sides(example)
        view = self._view(example, completion, *student)
        if teacher[1:] == student[1:]:  # without a prefix both read the same
            return view, view
        return view, self._view(example, completion, *teacher)

    def _view(self, example: Example, completion: Completion | None, name: str, chat: Chat, prefix):
        respond = completion is not None
        ids, flags = self._rendered(example, name, chat, prefix, respond=respond)
        if completion is not None:
            ids = np.concatenate([ids, np.asarray(completion.ids, np.int32)])
            flags = np.concatenate([flags, self.targets.of_completion(completion, chat)])
        places = np.flatnonzero(flags)
        if places.size and places[0] == 0:
            raise UserError(f"{name}: the first token of all is a target; nothing predicts it")
        length = places[-1] + 1 if places.size else len(ids)
        return View(ids[:length], (places - 1).astype(np.int32))

    def _difference(self, student: np.ndarray, teacher: np.ndarray) -> str:
        """The first target that differs, and the ends of turns if they differ."""
        both = itertools.zip_longest(student.tolist(), teacher.tolist())
        number, pair = next((n, pair) for n, pair in enumerate(both) if pair[0] != pair[1])
        chats = self.student_chat, self.teacher_chat
        tokens = [
            "nothing" if i is None else repr(chat.tokenizer.convert_ids_to_tokens(i))
            for chat, i in zip(chats, pair, strict=True)
        ]
        found = f"; target {number} is {tokens[0]} for the student and {tokens[1]} for the teacher"
        ends = [f"{chat.directory} ends a turn with {chat.end_of_turn}" for chat in chats]
        if chats[0].end_of_turn != chats[1].end_of_turn:
            found += f" ({', '.join(ends)}; give both the same chat_template.jinja)"
        return found

    def _require_roles(self, example: Example, completion: Completion | None) -> None:
        """Refuses a row that has no target because of its roles, and not of a pattern."""
        answer = () if example.answer is None else (example.answer,)
        messages = [*example.turns[example.given :], *answer]
        roles = {message.role for message in messages if message.learn}
        if completion is not None:
            roles.add("assistant")
        if self.targets.pattern is None or not roles & {*self.targets.roles}:
            raise UserError(
                f"{example.name}: no target tokens: it has no message of the roles "
                f"{', '.join(self.targets.roles)} to train on, or only such with 'weight': 0"
            )

    def _cached(self, num_targets: int, completion: Completion | None) -> TokenTopK | None:
        """The predictions of the writer, if all targets are of the completion."""
        if completion is None or not isinstance(completion.cached, TokenTopK):
            return None
        flags = self.targets.of_completion(completion, self.student_chat)
        if flags.sum() < num_targets:
            return None
        return jax.tree.map(lambda x: x[flags], completion.cached)


def _shown(chat: Chat, ids: np.ndarray) -> str:
    """The quoted text of ids with its special tokens; only the ends of a long one."""
    text = chat.decode(ids, special=True)
    return repr(text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}")
