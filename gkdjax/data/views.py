"""One example -> what the teacher reads and what the student reads, with the same targets.

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
from gkdjax.types import Completion, Example, Message, TokenTopK, View, ViewPair
from gkdjax.utils.errors import UserError


class RowStatus(enum.Enum):
    """What became of a row; callers count and name all but KEPT."""

    KEPT = "kept"
    TRUNCATED = "truncated"  # it lost targets at its end
    SHORTENED = "shortened"  # it lost messages, or text, at its beginning or in its prefix
    DROPPED = "dropped"  # too long
    EMPTY = "empty"  # its response has no token
    UNUSABLE = "unusable"  # it cannot be read or rendered, and data.bad_rows="drop"
    UNMATCHED = "unmatched"  # nothing to be learnt from it has context.target_content_pattern


@dataclasses.dataclass(frozen=True)
class ViewRules:
    """How the rows of one stream become view pairs.

    Attributes:
      student_chat: renders the student's view.
      teacher_chat: renders the teacher's.
      retained: this many messages at the end of the prefix are read by the student too; more than
        there are keeps all.
      targets: which messages are learnt, and how much of each.
      max_length: of the longer view.
      too_long: as `data.too_long`; what is to lose its beginning, or some of its prefix, has lost
        it before it comes here: see `truncation`.
    """

    student_chat: Chat
    teacher_chat: Chat
    retained: int
    targets: TargetRules
    max_length: int
    too_long: str

    def prompts(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """What (student, teacher) read before they write the response: int32 [S], int32 [T].

        Raises:
          UserError: a chat template refuses, drops or rewrites a message.
        """
        seen = _retained(example.prefix, self.retained) + example.turns
        whole = example.prefix + example.turns
        return (
            self.student_chat.prompt_ids(seen, f"{example.name}, student's view", example.tools),
            self.teacher_chat.prompt_ids(whole, f"{example.name}, teacher's view", example.tools),
        )

    def before_targets(self, example: Example) -> np.ndarray:
        """The teacher's prompt up to where its first target is predicted: int32 [n].

        All of the prompt if no turn is a target.
        """
        messages = example.prefix + example.turns
        learnt = (False,) * len(example.prefix) + self.targets.of_turns(example)
        name = f"{example.name}, teacher's view"
        how = {"generation_prompt": True, "tools": example.tools}
        ids, flags = self.teacher_chat.render(messages, learnt, name, **how)
        return ids[: flags.argmax()] if flags.any() else ids

    def lengths(self, example: Example) -> tuple[int, int]:
        """Tokens of (student's, teacher's) view, or of their prompts where there is no response.

        Raises:
          UserError: as `pair` for its own reasons, but for the target tokens.
        """
        if example.answer is None:
            student, teacher = self.prompts(example)
            return len(student), len(teacher)
        student, teacher = self._views(example, None)
        return len(student.ids), len(teacher.ids)

    def learns_at_once(self, example: Example, parts: Sequence[Example]) -> bool:
        """Whether a row's rendering teaches what its parts would, each with one answer at its end.

        Not if a template treats thoughts, tools or calls otherwise where more is said after them.
        """
        whole, apart = self._own_targets([example]), self._own_targets(parts)
        return whole is not None and apart in (None, whole)

    def _own_targets(self, examples: Sequence[Example]) -> list[list[int]] | None:
        """The target ids of rows, in the student's and the teacher's rendering; None: refused."""
        found: list[list[int]] = [[], []]
        try:
            for example in examples:
                seen = _retained(example.prefix, self.retained)
                both = (self.student_chat, seen), (self.teacher_chat, example.prefix)
                for told, (chat, prefix) in zip(found, both, strict=True):
                    asked = example.answer is None
                    ids, flags = _rendered("a", chat, prefix, example, self.targets, asked)
                    told += ids[flags].tolist()
        except UserError:
            return None
        return found

    def pair(
        self, example: Example, completion: Completion | None, *, too_long: str | None = None
    ) -> tuple[ViewPair | None, RowStatus]:
        """Both views of a row, and what became of it.

        Targets are what `targets` says of the turns and of the response; nothing of the prefix ever
        is, nor of the turns that are given. Tokens after the last target are left out: no
        prediction depends on them. Of a row that is too long, unless it is dropped, both views lose
        as many tokens at their end as the longer one has too many; a row that is left without a
        target is dropped all the same.

        Args:
          example: the row.
          completion: the response as ids, put after the generation prompt as they are; it replaces
            `example.answer`. If unfinished it has no end-of-turn token, and so no target for it.
          too_long: instead of the rules' own.

        Returns:
          (pair, KEPT or TRUNCATED) or (None, DROPPED), or (None, UNMATCHED) if the pattern leaves
          nothing to learn.

        Raises:
          UserError: no target token, or not the same ones in both views; and all that
            `Chat.render` raises. It names the row.
        """
        student, teacher = self._views(example, completion)
        target_ids = _target_ids(student)
        if not np.array_equal(target_ids, _target_ids(teacher)):
            told = self._first_differing(target_ids, _target_ids(teacher))
            raise UserError(
                f"{example.name}: the target tokens differ between the student's view and the "
                "teacher's: their tokenizers or chat templates write the same messages differently"
                f"{told}{self._ends_differ()}"
            )
        if len(target_ids) == 0:
            _require_roles(example, self.targets, completion)
            return None, RowStatus.UNMATCHED
        kept = _kept(len(target_ids), self.targets, completion, self.student_chat)
        pair = ViewPair(example.name, example.row_id, student, teacher, target_ids, kept)
        return _fit(pair, self.max_length, too_long or self.too_long)

    def described(self, pair: ViewPair) -> str:
        """What becomes of a row, for people: both views up to the first target, and all targets."""
        told = []
        for who, chat, view in (
            ("student", self.student_chat, pair.student),
            ("teacher", self.teacher_chat, pair.teacher),
        ):
            read = _shown(chat, view.ids[: view.at[0] + 1])
            told.append(f"the {who} reads {view.at[0] + 1} tokens, {read}")
        learnt = f"{len(pair.target_ids)} tokens, {_shown(self.student_chat, pair.target_ids)}"
        return f"{pair.name}: {'; '.join(told)}; learnt are {learnt}"

    def with_whole_responses(self) -> "ViewRules":
        """The same, whatever a completion says."""
        return dataclasses.replace(
            self, targets=dataclasses.replace(self.targets, whole_responses=True)
        )

    def _first_differing(self, student: np.ndarray, teacher: np.ndarray) -> str:
        """The end of a message: the first of two lists of targets' ids that is not the same."""
        both = itertools.zip_longest(student.tolist(), teacher.tolist())
        number, pair = next((n, pair) for n, pair in enumerate(both) if pair[0] != pair[1])
        chats = self.student_chat, self.teacher_chat
        tokens = [
            "nothing" if i is None else repr(chat.tokenizer.convert_ids_to_tokens(i))
            for chat, i in zip(chats, pair, strict=True)
        ]
        return f"; target {number} is {tokens[0]} for the student and {tokens[1]} for the teacher"

    def _ends_differ(self) -> str:
        """The end of a message: how the templates end turns otherwise, and what to do."""
        student, teacher = self.student_chat, self.teacher_chat
        if student.end_of_turn == teacher.end_of_turn:
            return ""
        return (
            f" ({student.directory} ends a turn with {student.end_of_turn}, {teacher.directory}"
            f" with {teacher.end_of_turn}; give both the same chat_template.jinja)"
        )

    def _views(self, example: Example, completion: Completion | None) -> tuple[View, View]:
        seen = _retained(example.prefix, self.retained)
        return (
            _view("student", self.student_chat, seen, example, self.targets, completion),
            _view("teacher", self.teacher_chat, example.prefix, example, self.targets, completion),
        )


def _require_roles(example: Example, targets: TargetRules, completion: Completion | None) -> None:
    """Raises UserError if a row has no target because of its roles, and not of a pattern."""
    answer = () if example.answer is None else (example.answer,)
    said = [*example.turns[example.given :], *answer]
    roles = {message.role for message in said if message.learn}
    if completion is not None:
        roles.add("assistant")
    if targets.pattern is None or not roles & {*targets.roles}:
        raise UserError(
            f"{example.name}: no target tokens: it has no message of the roles "
            f"{', '.join(targets.roles)} to train on, or only such with 'weight': 0"
        )


def _kept(
    num_targets: int, targets: TargetRules, completion: Completion | None, chat: Chat
) -> TokenTopK | None:
    """What was kept of the targets; of use only where all of them are of the completion."""
    if completion is None or not isinstance(completion.kept, TokenTopK):
        return None
    flags = targets.of_completion(completion, chat)
    if flags.sum() < num_targets:
        return None
    return jax.tree.map(lambda x: x[flags], completion.kept)


def _retained(prefix: tuple[Message, ...], count: int) -> tuple[Message, ...]:
    return prefix[-count:] if count else ()  # prefix[-0:] would be all of it


def _view(
    whose: str,
    chat: Chat,
    prefix: tuple[Message, ...],
    example: Example,
    targets: TargetRules,
    completion: Completion | None,
) -> View:
    ids, flags = _rendered(whose, chat, prefix, example, targets, completion is not None)
    if completion is not None:
        ids = np.concatenate([ids, np.asarray(completion.ids, np.int32)])
        flags = np.concatenate([flags, targets.of_completion(completion, chat)])
    places = np.flatnonzero(flags)
    if places.size and places[0] == 0:
        name = f"{example.name}, {whose}'s view"
        raise UserError(f"{name}: the first token of all is a target, and nothing predicts it")
    length = places[-1] + 1 if places.size else len(ids)
    return View(ids[:length], (places - 1).astype(np.int32))


def _rendered(
    whose: str,
    chat: Chat,
    prefix: tuple[Message, ...],
    example: Example,
    targets: TargetRules,
    to_be_answered: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """What `Chat.render` makes of a row, with its own answer or up to where one is to stand."""
    messages = prefix + example.turns
    learnt = (False,) * len(prefix) + targets.of_turns(example)
    if example.answer is not None and not to_be_answered:
        messages += (example.answer,)
        learnt += (targets.of_message(example.answer),)
    return chat.render(
        messages,
        learnt,
        f"{example.name}, {whose}'s view",
        generation_prompt=to_be_answered,
        tools=example.tools,
    )


def _shown(chat: Chat, ids: np.ndarray) -> str:
    """The text of ids with its special tokens, in quotes; of a long one its ends."""
    text = chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return repr(text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}")


def _target_ids(view: View) -> np.ndarray:
    return view.ids[view.at + 1]


def _fit(pair: ViewPair, max_length: int, too_long: str) -> tuple[ViewPair | None, RowStatus]:
    excess = max(len(pair.student.ids), len(pair.teacher.ids)) - max_length
    if excess <= 0:
        return pair, RowStatus.KEPT
    if too_long == "drop":
        return None, RowStatus.DROPPED
    views = (pair.student, pair.teacher)
    kept = min(int((view.at + 1 < len(view.ids) - excess).sum()) for view in views)
    if kept == 0:
        return None, RowStatus.DROPPED
    student, teacher = (View(view.ids[:-excess], view.at[:kept]) for view in views)
    said = None if pair.kept is None else jax.tree.map(lambda x: x[:kept], pair.kept)
    cut = ViewPair(pair.name, pair.row_id, student, teacher, pair.target_ids[:kept], said)
    return cut, RowStatus.TRUNCATED
