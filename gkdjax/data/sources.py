"""Rows -> Examples. Nothing is skipped, and nothing is guessed.

A row has, under names that data sets use (null counts as absent):

1. Its turns, exactly one of: `prompt`, `user_message`, `input`, `question`, `instruction`, `text`
   (a string, one user message), or `messages`, `turns`, `conversations` (a list of {"role",
   "content"}, or of ShareGPT's {"from", "value"}).
2. Its response, at most one of: the last message of that list, if it is from the assistant;
   `response`, `completion`, `output`, `target`, and in training rows `answer`. Without one,
   somebody writes it.
3. `prefix_messages`, a list as above: its own prefix. An empty list counts as absent.
4. In questions for the evaluation, one of `answer`, `expected`, `target`: what is right, a string
   or a list of strings any of which is; and `match`, if it is not `eval.match`.

There is no precedence among names for the same thing: a row with two of them is refused with the
question which one is meant, unless a prompt says again how the list of turns begins. Rows of one
source may differ.
"""

import collections

from absl import logging

from gkdjax.config_checks import MATCHES
from gkdjax.data.answers import check_patterns
from gkdjax.data.fields import kind, messages, text
from gkdjax.data.files import read_rows
from gkdjax.errors import UserError
from gkdjax.types import Example, Expected, Message

_PROMPTS = ("prompt", "user_message", "input", "question", "instruction", "text")
_CHATS = ("messages", "turns", "conversations")
_RESPONSES = ("response", "completion", "output", "target")
_ANSWERS = ("answer", "expected", "target")
_COLUMNS = (*_PROMPTS, *_CHATS, *_RESPONSES, "answer", "prefix_messages")
_RESPONSES_TO_QUESTIONS = tuple(name for name in _RESPONSES if name not in _ANSWERS)
_QUESTION_COLUMNS = (*dict.fromkeys((*_COLUMNS, *_ANSWERS)), "match")


def read_examples(
    source: str | tuple[dict, ...], key: str, *, match: str | None = None
) -> list[Example]:
    """All rows of `source`, in order, as this module's description has them.

    Columns that nothing reads are named in the log, once, and so are the kinds of rows and their
    numbers where there are several.

    Args:
      source: a file, a dataset (see `gkdjax.data.files`), or the rows themselves.
      key: where the config has it, as "data.train"; it names the rows that have no file.
      match: of questions for the evaluation, how answers are looked at unless a row says it: what
        is expected of them is no response. None: rows to train on.

    Raises:
      UserError: naming the file or key, the line or row, the field, and what is wrong with it.
    """
    where = f"{key} = {source}" if isinstance(source, str) else key
    unread: set[str] = set()
    shapes: collections.Counter[str] = collections.Counter()
    examples = []
    for name, row in read_rows(source, key):
        example, shape = _example(row, name, len(examples), match, unread)
        examples.append(example)
        shapes[shape] += 1
    if not examples:
        raise UserError(f"{where}: holds no rows")
    if len(shapes) > 1:
        counted = "; ".join(f"{count} of {shape}" for shape, count in shapes.items())
        logging.info("%s: %d kinds of rows: %s", where, len(shapes), counted)
    if unread:
        logging.warning("%s: columns that nothing reads: %s", where, ", ".join(sorted(unread)))
    return examples


def _example(
    row: object, name: str, row_id: int, match: str | None, unread: set[str]
) -> tuple[Example, str]:
    """-> the Example, and for people what it was made of."""
    if not isinstance(row, dict):
        raise UserError(f"{name}: a row must be an object with columns, not {kind(row)}")
    columns = _COLUMNS if match is None else _QUESTION_COLUMNS
    unread.update(str(column) for column in row if column not in columns)
    given = {c: row[c] for c in columns if c in row and row[c] is not None}
    turns = _turns(given, name, unread)
    expected = None if match is None else _expected(given, match, name)
    responses = (*_RESPONSES, "answer") if match is None else _RESPONSES_TO_QUESTIONS
    answer = _answer({c: given[c] for c in responses if c in given}, turns, name)
    shape = ", ".join(given)
    if turns[-1].role == "assistant":
        *turns, _ = turns
        shape += " (the last message is the response)"
    if not turns:
        raise UserError(f"{name}: has no turns before the response; add the question to it")
    prefix: tuple[Message, ...] = ()
    if "prefix_messages" in given:
        prefix = messages(given["prefix_messages"], f"{name}: prefix_messages", unread)
    return Example(name, row_id, prefix, tuple(turns), answer, expected), shape


def _expected(given: dict, match: str, name: str) -> Expected | None:
    found = [column for column in _ANSWERS if column in given]
    if len(found) > 1:
        raise UserError(f"{name}: which is the answer, {' or '.join(found)}? Keep one column")
    if "match" in given:
        match = given["match"]
    if match not in MATCHES:
        raise UserError(f"{name}: match = {match!r}: it is one of {', '.join(MATCHES)}")
    if not found:
        return None
    where, listed = f"{name}: {found[0]}", given[found[0]]
    if not isinstance(listed, list | tuple):
        listed = [listed]
    if not listed:
        raise UserError(f"{where} is an empty list; name at least one answer that is right")
    expected = Expected(match, tuple(text(value, where) for value in listed))
    check_patterns(expected, where)
    return expected


def _turns(given: dict, name: str, unread: set[str]) -> tuple[Message, ...]:
    named = (*_PROMPTS, *_CHATS)
    found = [column for column in named if column in given]
    if not found:
        raise UserError(f"{name}: has no turns; give it one of {', '.join(named)}")
    found = _without_repeated(found, given)
    if len(found) > 1:
        raise UserError(f"{name}: which are its turns, {' or '.join(found)}? Keep one column")
    (column,) = found
    if column in _PROMPTS:
        return (Message("user", text(given[column], f"{name}: {column}")),)
    turns = messages(given[column], f"{name}: {column}", unread)
    if not turns:
        raise UserError(f"{name}: has no turns: {column} is an empty list")
    return turns


def _without_repeated(found: list[str], given: dict) -> list[str]:
    """Without columns that say again how the conversation begins, as ultrachat_200k has one."""
    chats = [given[column] for column in found if column in _CHATS]
    if len(chats) != 1 or not isinstance(chats[0], list | tuple):
        return found
    said = (m for m in chats[0] if isinstance(m, dict) and m.get("role") != "system")
    first = next(said, {}).get("content")
    return [column for column in found if column in _CHATS or given[column] != first]


def _answer(found: dict, turns: tuple[Message, ...], name: str) -> Message | None:
    """The response: of the columns that hold one, and the last message."""
    if len(found) > 1:
        raise UserError(f"{name}: which is the response, {' or '.join(found)}? Keep one column")
    written = None
    for column, value in found.items():
        written = Message("assistant", text(value, f"{name}: {column}"))
    if turns[-1].role != "assistant":
        return written
    if found:
        raise UserError(
            f"{name}: which is the response, the column {next(iter(found))!r} or the last message,"
            " which is from the assistant too? Leave one out"
        )
    return turns[-1]
