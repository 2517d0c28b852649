"""Rows -> Examples. Nothing is skipped, and nothing is guessed.

A row has, under names that data sets use (null counts as absent):

1. Its turns, exactly one of: `prompt`, `user_message`, `input`, `question`, `instruction`, `text`
   (a string, one user message), or `messages`, `turns`, `conversations` (a list of {"role",
   "content"}, or of ShareGPT's {"from", "value"}).
2. Its response, at most one of: the last message of that list, if it is from the assistant;
   `response`, `completion`, `output`, `target`, and in training rows `answer`. Without one,
   somebody writes it.
3. `prefix_messages`, a list as above: its own prefix. An empty list counts as absent.
4. In questions for the evaluation, `answer`: the exact answer.

There is no precedence among names for the same thing: a row with two of them is refused with the
question which one is meant. Rows of one source may differ.
"""

import collections

from absl import logging

from gkdjax.data.fields import kind, messages, text
from gkdjax.data.files import read_rows
from gkdjax.errors import UserError
from gkdjax.types import Example, Message

_PROMPTS = ("prompt", "user_message", "input", "question", "instruction", "text")
_CHATS = ("messages", "turns", "conversations")
_RESPONSES = ("response", "completion", "output", "target")
_COLUMNS = (*_PROMPTS, *_CHATS, *_RESPONSES, "answer", "prefix_messages")


def read_examples(
    source: str | tuple[dict, ...], key: str, *, questions: bool = False
) -> list[Example]:
    """All rows of `source`, in order, as this module's description has them.

    Columns that nothing reads are named in the log, once, and so are the kinds of rows and their
    numbers where there are several.

    Args:
      source: a file, a dataset (see `gkdjax.data.files`), or the rows themselves.
      key: where the config has it, as "data.train"; it names the rows that have no file.
      questions: for the evaluation: `answer` is the exact answer, and no response.

    Raises:
      UserError: naming the file or key, the line or row, the field, and what is wrong with it.
    """
    where = f"{key} = {source}" if isinstance(source, str) else key
    unread: set[str] = set()
    shapes: collections.Counter[str] = collections.Counter()
    examples = []
    for name, row in read_rows(source, key):
        example, shape = _example(row, name, len(examples), questions, unread)
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
    row: object, name: str, row_id: int, questions: bool, unread: set[str]
) -> tuple[Example, str]:
    """-> the Example, and for people what it was made of."""
    if not isinstance(row, dict):
        raise UserError(f"{name}: a row must be an object with columns, not {kind(row)}")
    unread.update(str(column) for column in row if column not in _COLUMNS)
    given = {c: row[c] for c in _COLUMNS if c in row and row[c] is not None}
    turns = _turns(given, name, unread)
    answer = text(given["answer"], f"{name}: answer") if "answer" in given else None
    response = _response(given, turns, name, questions)
    shape = ", ".join(given)
    if turns[-1].role == "assistant":
        *turns, _ = turns
        shape += " (the last message is the response)"
    if not turns:
        raise UserError(f"{name}: has no turns before the response; add the question to it")
    prefix: tuple[Message, ...] = ()
    if "prefix_messages" in given:
        prefix = messages(given["prefix_messages"], f"{name}: prefix_messages", unread)
    example = Example(
        name=name,
        row_id=row_id,
        prefix=prefix,
        turns=tuple(turns),
        response=response,
        answer=answer if questions else None,
    )
    return example, shape


def _turns(given: dict, name: str, unread: set[str]) -> tuple[Message, ...]:
    named = (*_PROMPTS, *_CHATS)
    found = [column for column in named if column in given]
    if not found:
        raise UserError(f"{name}: has no turns; give it one of {', '.join(named)}")
    if len(found) > 1:
        raise UserError(f"{name}: which are its turns, {' or '.join(found)}? Keep one column")
    (column,) = found
    if column in _PROMPTS:
        return (Message("user", text(given[column], f"{name}: {column}")),)
    turns = messages(given[column], f"{name}: {column}", unread)
    if not turns:
        raise UserError(f"{name}: has no turns: {column} is an empty list")
    return turns


def _response(given: dict, turns: tuple[Message, ...], name: str, questions: bool) -> str | None:
    columns = _RESPONSES if questions else (*_RESPONSES, "answer")
    found = {column: given[column] for column in columns if column in given}
    if len(found) > 1:
        raise UserError(f"{name}: which is the response, {' or '.join(found)}? Keep one column")
    written = None
    for column, value in found.items():
        written = text(value, f"{name}: {column}")
    if turns[-1].role != "assistant":
        return written
    if found:
        raise UserError(
            f"{name}: which is the response, the column {next(iter(found))!r} or the last message,"
            " which is from the assistant too? Leave one out"
        )
    return turns[-1].content
