"""Rows -> Examples. `data/README.md` is the manual of the fields of a row.

Nothing is skipped and nothing is guessed: a row with two names for one thing is refused with the
question which one is meant, and fields that nothing reads are refused or named in the log.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

from absl import logging

from gkdjax.config.schema import MATCHES
from gkdjax.data import row_schema
from gkdjax.data.answer_matching import check_patterns
from gkdjax.data.readers import read_rows
from gkdjax.data.row_schema import is_nothing, kind, shown, text
from gkdjax.types import Example, Expected, Message
from gkdjax.utils.errors import UserError

_PROMPTS = ("prompt", "user_message", "input", "question", "instruction", "text")
_CHATS = ("messages", "turns", "conversations")
_RESPONSES = ("response", "completion", "output", "target")
_ANSWERS = ("answer", "expected", "target")
_SYSTEMS = ("system", "system_prompt")
_COLUMNS = (*_PROMPTS, *_CHATS, *_RESPONSES, "answer", "prefix_messages", *_SYSTEMS, "tools")
_QUESTION_COLUMNS = (*_COLUMNS, "expected", "match")
_MOST_SHOWN = 3  # reasons, and names of rows for each, in a message about bad rows


class BadRows:
    """Collects rows that cannot be used, and refuses or drops them (`data.bad_rows`).

    Attributes:
      dropped: the config's key of a source -> the names of its rows that were dropped.
    """

    def __init__(self, rule: str = "refuse"):
        self.dropped: dict[str, list[str]] = {}
        self._rule = rule
        self._found: list[tuple[str, UserError]] = []

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[None]:
        """Catches a UserError about the row of this name."""
        try:
            yield
        except UserError as error:
            self._found.append((name, error))

    def settle(self, key: str, where: str, left: int) -> None:
        """Ends the source `where`, which has `left` good rows; `key` is the config's.

        UserError: there are bad rows, and they are refused or all that there is.
        """
        found, self._found = self._found, []
        if not found:
            return
        names_of: dict[str, list[str]] = {}  # by reason
        for name, error in found:
            message = str(error)
            reason = message.removeprefix(name) if message.startswith(name) else f": {message}"
            names_of.setdefault(reason, []).append(name)
        shown = []
        for reason, (first, *others) in list(names_of.items())[:_MOST_SHOWN]:
            names = ", ".join(others[:_MOST_SHOWN]) + (", ..." if others[_MOST_SHOWN:] else "")
            also = f" (and {len(others)} more: {names})" if others else ""
            shown.append(f"{first}{reason}{also}")
        if len(names_of) > _MOST_SHOWN:
            shown.append(f"and {len(names_of) - _MOST_SHOWN} other reasons")
        message = "; ".join(shown)
        if self._rule == "refuse":
            advice = "; data.bad_rows='drop' would leave such rows out" if left else ""
            if len(found) == 1:
                raise UserError(f"{message}{advice}") from found[0][1]
            raise UserError(f"{where}: {len(found)} rows cannot be used{advice}: {message}")
        if not left:
            raise UserError(f"{where}: no row is left of {len(found)}, all were dropped: {message}")
        self.dropped.setdefault(key, []).extend(name for name, _ in found)
        logging.warning("%s: %d rows dropped (data.bad_rows): %s", where, len(found), message)


def read_examples(
    source: str | tuple[dict, ...],
    key: str,
    *,
    match: str | None = None,
    roles: Sequence[str] = ("assistant",),
    bad_rows: BadRows | None = None,
) -> list[Example]:
    """All rows of `source`, in order.

    The log names columns that nothing reads, and counts the kinds of rows if there are several.

    Args:
      source: a file, a dataset (see `read_rows`), or the rows themselves.
      key: of the config, as "data.train"; it names the rows that have no file.
      match: how answers to questions are compared, unless a row names it; None: rows to train on.
      roles: `context.target_roles`, which stay as they are.
      bad_rows: takes in rows that cannot be used; None: they are refused.

    Raises:
      UserError: naming the file or key, the line or row, the field, and what is wrong with it.
    """
    where = f"{key} = {source}" if isinstance(source, str) else key
    bad_rows = bad_rows or BadRows()
    unread: set[str] = set()
    kinds: collections.Counter[str] = collections.Counter()
    examples, rows = [], 0
    for name, row in read_rows(source, key):
        with bad_rows.row(name):
            example, columns = _Reader(name, unread, roles, match).example(row, rows)
            examples.append(example)
            kinds[columns] += 1
        rows += 1
    if not rows:
        raise UserError(f"{where}: holds no rows")
    bad_rows.settle(key, where, len(examples))
    if len(kinds) > 1:
        counted = "; ".join(f"{count} of {columns}" for columns, count in kinds.items())
        logging.info("%s: %d kinds of rows: %s", where, len(kinds), counted)
    if unread:
        logging.warning("%s: columns that nothing reads: %s", where, ", ".join(sorted(unread)))
    return examples


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads one row."""

    name: str
    unread: set[str]  # takes in the names of fields that nothing reads
    roles: Sequence[str]
    match: str | None  # None: a row to train on
    given: dict = dataclasses.field(default_factory=dict)  # the row's columns that are not null

    def example(self, row: object, row_id: int) -> tuple[Example, str]:
        """The Example, and for people what it was made of."""
        if not isinstance(row, dict):
            raise self._error(f"a row must be an object with columns, not {kind(row)}")
        given, is_question = self.given, self.match is not None
        columns = _QUESTION_COLUMNS if is_question else _COLUMNS
        row_schema.refuse_unread(_without_harmless(row), row_schema.ROW_REFUSED, self.name)
        self.unread.update(shown(column) for column in row if column not in columns)
        given.update((c, row[c]) for c in columns if c in row and row[c] is not None)
        self._drop_joined_text()
        self._drop_repeated()
        turns = self._turns()
        if not is_question and "answer" in given and turns[-1].role == "assistant":
            del given["answer"]  # the result of the last message
            self.unread.add("answer (beside a response)")
        expected = self._expected() if is_question else None
        names = (c for c in (*_RESPONSES, "answer") if not is_question or c not in _ANSWERS)
        responses = [column for column in names if column in given]
        before, answer = self._answer(responses, turns)
        kinds = ", ".join(given)
        if turns[-1].role == "assistant":
            turns = turns[:-1]
            kinds += " (the last message is the response)"
        if not turns:
            raise self._error("has no turns before the response; add the question to it")
        turns = self._system(turns) + turns
        is_prompt = isinstance(given.get("prompt"), list | tuple)
        is_prompt = is_prompt or any(_is_talk(column, given[column]) for column in responses)
        prefix = self._messages("prefix_messages") if "prefix_messages" in given else ()
        tools = row_schema.tools(given["tools"], f"{self.name}: tools") if "tools" in given else ""
        count = len(turns) if is_prompt else 0
        read = (self.name, row_id, prefix, turns + before, answer, expected, count, tools)
        return Example(*read), kinds

    def _error(self, message: str) -> UserError:
        return UserError(f"{self.name}: {message}")

    def _text(self, column: str) -> str:
        return text(self.given[column], f"{self.name}: {column}")

    def _messages(self, column: str) -> tuple[Message, ...]:
        where = f"{self.name}: {column}"
        return row_schema.messages(self.given[column], where, self.unread, self.roles)

    def _only(self, found: Sequence[str], what: str) -> str | None:
        """The column of `found`, which must not be several; None: there is none."""
        if len(found) > 1:
            raise self._error(f"which {what}, {' or '.join(found)}? Keep one column")
        return found[0] if found else None

    def _system(self, turns: tuple[Message, ...]) -> tuple[Message, ...]:
        """The message of a system column, unless the turns begin with it."""
        found = [c for c in _SYSTEMS if c in self.given and not is_nothing(self.given[c])]
        column = self._only(found, "is the system message")
        if column is None:
            return ()
        content = self._text(column)
        if turns[0].role != "system":
            return (Message("system", content),)
        if turns[0].content != content:
            raise self._error(
                f"which is the system message, the column {column!r} or the first of the turns?"
            )
        return ()

    def _expected(self) -> Expected | None:
        column = self._only([c for c in _ANSWERS if c in self.given], "is the answer")
        match = self.match
        if "match" in self.given:
            match = self.given["match"]
        if match not in MATCHES:
            value = row_schema.shown_value(match)
            raise self._error(f"match = {value}: it is one of {', '.join(MATCHES)}")
        if column is None:
            return None
        where, listed = f"{self.name}: {column}", self.given[column]
        if not isinstance(listed, list | tuple):
            listed = [listed]
        if not listed:
            raise UserError(f"{where} is an empty list; name at least one answer that is right")
        expected = Expected(match, tuple(row_schema.answer_text(value, where) for value in listed))
        check_patterns(expected, where)
        return expected

    def _turns(self) -> tuple[Message, ...]:
        given, names = self.given, (*_PROMPTS, *_CHATS)
        found = [column for column in names if column in given]
        if not found:
            raise self._error(f"has no turns; give it one of {', '.join(names)}")
        if found == ["input", "instruction"]:  # Alpaca's
            content = self._text("instruction")
            if not is_nothing(given["input"]):
                content += "\n\n" + self._text("input")
            return (Message("user", content),)
        column = self._only(found, "are its turns")
        is_prompt = column == "prompt" and isinstance(given[column], list | tuple)
        if column in _PROMPTS and not is_prompt:
            return (Message("user", self._text(column)),)
        turns = self._messages(column)
        if not turns:
            raise self._error(f"has no turns: {column} is an empty list")
        if is_prompt and turns[-1].role == "assistant":
            advice = "if that is the response, name the list 'messages'"
            raise self._error(f"prompt ends with the assistant's message; {advice}")
        return turns

    def _drop_joined_text(self) -> None:
        """Drops Alpaca's `text`: its other columns in a prompt, with the output at the end."""
        given = self.given
        if "text" not in given or "instruction" not in given:
            return
        values = [given[c] for c in ("text", "instruction", *_RESPONSES) if c in given]
        if len(values) == 3 and all(isinstance(value, str) for value in values):
            joined, instruction, output = (value.strip() for value in values)
            before = joined.removesuffix(output)
            if instruction and instruction in before and before != joined:
                del given["text"]
                self.unread.add("text (the other columns, joined)")
                return
        raise self._error("which are its turns, instruction or text? Remove 'text' if it says both")

    def _drop_repeated(self) -> None:
        """Drops columns that repeat how the conversation begins, as ultrachat_200k has one."""
        given = self.given
        prompts, chats = ([c for c in names if c in given] for names in (_PROMPTS, _CHATS))
        if not prompts or len(chats) != 1 or not isinstance(given[chats[0]], list | tuple):
            return
        messages = self._messages(chats[0])
        first = next((m.content.strip() for m in messages if m.role != "system"), None)
        for column in prompts:
            value = given[column]
            repeats = isinstance(value, str) and value.strip() == first
            if column == "prompt" and isinstance(value, list | tuple):
                prompt = self._messages(column)
                repeats = bool(prompt) and prompt == messages[: len(prompt)]
            if repeats:
                del given[column]

    def _answer(
        self, found: list[str], turns: tuple[Message, ...]
    ) -> tuple[tuple[Message, ...], Message | None]:
        """The messages before the response in its column, and the response, or the last turn."""
        column, before, answer = self._only(found, "is the response"), (), None
        if column is not None and not _is_talk(column, self.given[column]):
            where = f"{self.name}: {column}"
            answer = Message("assistant", row_schema.response_text(self.given[column], where))
        elif column is not None:
            *before, answer = self._messages(column) or (None,)
            if answer is None or answer.role != "assistant":
                raise self._error(f"{column} has to end with the assistant's message")
            if tuple(before[:1]) == turns[-1:]:
                raise self._error(
                    f"{column} begins with the question, which the turns end with as well; if it is"
                    " the whole conversation, name it 'messages' and remove the other column"
                )
        if turns[-1].role != "assistant":
            return tuple(before), answer
        if column is not None:
            raise self._error(
                f"which is the response, the column {column!r} or the last message? Keep one"
            )
        return (), turns[-1]


def _is_talk(column: str, value: object) -> bool:
    """Whether a response is a list of messages, and not of expected answers."""
    if not isinstance(value, list | tuple):
        return False
    return column == "completion" or {*map(type, value)} == {dict}


def _without_harmless(row: dict) -> dict:
    """Without a preferred answer that is learnt anyway, a weight of 1, and a label but "no"."""
    learnt = [row[column] for column in (*_CHATS, *_RESPONSES) if column in row]
    harmless = {"chosen", "rejected"} if "chosen" in row and row["chosen"] in learnt else set()
    weight, label = row.get("weight"), row.get("label")
    if row_schema.is_number(weight, 1) or weight in ("1", "1.0"):
        harmless.add("weight")
    label = label.strip().lower() if isinstance(label, str) else label
    # False, or KTO's 0 beside an answer.
    is_zero = label == "0" or row_schema.is_number(label, 0)
    if not (label is False or label == "false" or (learnt and is_zero)):
        harmless.add("label")
    return {column: value for column, value in row.items() if column not in harmless}
