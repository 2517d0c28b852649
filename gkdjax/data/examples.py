"""Rows -> Examples. Nothing is skipped, and nothing is guessed.

A row has, under names that data sets use (null counts as absent):

1. Its turns, exactly one of: `prompt`, `user_message`, `input`, `question`, `instruction`, `text`
   (a string, one user message), or `messages`, `turns`, `conversations` (a list of {"role",
   "content"}, or of ShareGPT's {"from", "value"}). Alpaca's `input` beside its `instruction` is
   joined to it after a blank line. `prompt` may be a list of messages, too, as TRL's: it is read
   and never learnt.
2. Its response, at most one of: the last message of that list, if it is from the assistant;
   `response`, `completion`, `output`, `target`, and in training rows `answer`. It may be a list of
   messages, whose last one is the response; a whole number is its digits. Without one, somebody
   writes it.
3. `system` or `system_prompt`: a system message before the turns. `tools`: a list, or its JSON
   text, that the chat template describes to the model.
4. `prefix_messages`, a list as above: its own prefix. An empty list counts as absent.
5. In questions for the evaluation, one of `answer`, `expected`, `target`: what is right, a string,
   a number, or a list of them any of which is; and `match`, if it is not `eval.match`.

A message's role may have the names that data sets use, as `human` and `gpt`, `prompter`, `model`,
`bot`; `tool` and its like stay, and nobody else speaks unless `context.target_roles` names them.
Content is text, or a list of {"type": "text", "text"}, joined without anything between. What the
template is given beside it: `tool_calls`, `reasoning_content`, `reasoning`, `thinking`, `name`,
`tool_call_id`. `weight`, `trainable` or `train` of 0 or false: the message is no target.

There is no precedence among names for the same thing: a row with two of them is refused with the
question which one is meant, unless a prompt says again how the list of turns begins, `text` has the
instruction and the output in it (Alpaca's), or `answer` in training rows stands beside turns that
end with the assistant's (their result in short); the last two are told in the log. Fields that
would change what is learnt and that nothing reads (`row_schema.ROW_REFUSED`) are refused by name,
and other columns are told once in the log. Rows of one source may differ.
"""

import collections
import dataclasses
from collections.abc import Sequence

from absl import logging

from gkdjax.config.checks import MATCHES
from gkdjax.data import row_schema
from gkdjax.data.answer_matching import check_patterns
from gkdjax.data.bad_rows import BadRows
from gkdjax.data.readers import read_rows
from gkdjax.data.row_schema import kind, says_nothing, shown, text
from gkdjax.types import Example, Expected, Message
from gkdjax.utils.errors import UserError

_PROMPTS = ("prompt", "user_message", "input", "question", "instruction", "text")
_CHATS = ("messages", "turns", "conversations")
_RESPONSES = ("response", "completion", "output", "target")
_ANSWERS = ("answer", "expected", "target")
_SYSTEMS = ("system", "system_prompt")
_COLUMNS = (*_PROMPTS, *_CHATS, *_RESPONSES, "answer", "prefix_messages", *_SYSTEMS, "tools")
_RESPONSES_TO_QUESTIONS = tuple(name for name in _RESPONSES if name not in _ANSWERS)
_QUESTION_COLUMNS = (*dict.fromkeys((*_COLUMNS, *_ANSWERS)), "match")


def read_examples(
    source: str | tuple[dict, ...],
    key: str,
    *,
    match: str | None = None,
    roles: Sequence[str] = ("assistant",),
    bad_rows: BadRows | None = None,
) -> list[Example]:
    """All rows of `source`, in order, as this module's description has them.

    Columns that nothing reads are named in the log, once, and so are the kinds of rows and their
    numbers where there are several.

    Args:
      source: a file, a dataset (see `gkdjax.data.readers`), or the rows themselves.
      key: where the config has it, as "data.train"; it names the rows that have no file.
      match: of questions for the evaluation, how answers are looked at unless a row says it: what
        is expected of them is no response. None: rows to train on.
      roles: `context.target_roles`, which are known whatever they are.
      bad_rows: what becomes of rows that cannot be used; None: they are refused.

    Raises:
      UserError: naming the file or key, the line or row, the field, and what is wrong with it.
    """
    where = f"{key} = {source}" if isinstance(source, str) else key
    bad_rows = BadRows() if bad_rows is None else bad_rows
    unread: set[str] = set()
    shapes: collections.Counter[str] = collections.Counter()
    examples, rows = [], 0
    for name, row in read_rows(source, key):
        with bad_rows.row(name):
            example, shape = _example(row, rows, match, _Reader(name, unread, roles))
            examples.append(example)
            shapes[shape] += 1
        rows += 1
    if not rows:
        raise UserError(f"{where}: holds no rows")
    bad_rows.settle(key, where, len(examples))
    if len(shapes) > 1:
        counted = "; ".join(f"{count} of {shape}" for shape, count in shapes.items())
        logging.info("%s: %d kinds of rows: %s", where, len(shapes), counted)
    if unread:
        logging.warning("%s: columns that nothing reads: %s", where, ", ".join(sorted(unread)))
    return examples


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the messages of one row."""

    name: str  # of the row
    unread: set[str]  # takes in the names of fields that nothing reads
    roles: Sequence[str]

    def messages(self, given: dict, column: str) -> tuple[Message, ...]:
        where = f"{self.name}: {column}"
        return row_schema.messages(given[column], where, self.unread, self.roles)


def _example(row: object, row_id: int, match: str | None, reader: _Reader) -> tuple[Example, str]:
    """-> the Example, and for people what it was made of."""
    name = reader.name
    if not isinstance(row, dict):
        raise UserError(f"{name}: a row must be an object with columns, not {kind(row)}")
    columns = _COLUMNS if match is None else _QUESTION_COLUMNS
    row_schema.refuse_unread(_not_said_again(row), row_schema.ROW_REFUSED, name)
    reader.unread.update(shown(column) for column in row if column not in columns)
    given = {c: row[c] for c in columns if c in row and row[c] is not None}
    _leave_out_joined_text(given, reader)
    turns, prompted = _turns(given, reader)
    if match is None and "answer" in given and turns[-1].role == "assistant":
        del given["answer"]  # what the last message comes to
        reader.unread.add("answer (beside a response)")
    expected = None if match is None else _expected(given, match, name)
    responses = (*_RESPONSES, "answer") if match is None else _RESPONSES_TO_QUESTIONS
    said, answer = _answer({c: given[c] for c in responses if c in given}, turns, reader)
    shape = ", ".join(given)
    if turns[-1].role == "assistant":
        turns = turns[:-1]
        shape += " (the last message is the response)"
    if not turns:
        raise UserError(f"{name}: has no turns before the response; add the question to it")
    system = _system(given, turns, name)
    before = (*system, *turns)
    apart = prompted or any(_is_talk(column, given.get(column)) for column in responses)
    prefix: tuple[Message, ...] = ()
    if "prefix_messages" in given:
        prefix = reader.messages(given, "prefix_messages")
    example = Example(
        name,
        row_id,
        prefix,
        (*before, *said),
        answer,
        expected,
        given=len(before) if apart else 0,
        tools=row_schema.tools(given["tools"], f"{name}: tools") if "tools" in given else "",
    )
    return example, shape


def _not_said_again(row: dict) -> dict:
    """Without a preferred answer that is the one to be learnt, and a label that is not "no"."""
    learnt = [row[column] for column in (*_CHATS, *_RESPONSES) if column in row]
    again = "chosen" in row and row["chosen"] in learnt
    left_out = ("chosen", "rejected") if again else ()
    return {
        column: value
        for column, value in row.items()
        if column not in left_out
        and (column != "label" or _is_refusal(value, bool(learnt)))
        and (column != "weight" or not (row_schema.is_number(value, 1) or value in ("1", "1.0")))
    }


def _is_refusal(label: object, answered: bool) -> bool:
    """Whether a label says that the answer is not wanted: false, or KTO's 0 beside an answer."""
    said = label.strip().lower() if isinstance(label, str) else label
    return (
        said is False
        or said == "false"
        or (answered and (said == "0" or row_schema.is_number(said, 0)))
    )


def _system(given: dict, turns: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """The message of a system column, unless the turns begin with it."""
    found = [column for column in _SYSTEMS if column in given and not says_nothing(given[column])]
    if not found:
        return ()
    if len(found) > 1:
        raise UserError(f"{name}: which is the system message, {' or '.join(found)}? Keep one")
    said = text(given[found[0]], f"{name}: {found[0]}")
    if turns[0].role != "system":
        return (Message("system", said),)
    if turns[0].content != said:
        raise UserError(
            f"{name}: which is the system message, the column {found[0]!r} or the first of the"
            " turns, which says something else? Keep one of them"
        )
    return ()


def _expected(given: dict, match: str, name: str) -> Expected | None:
    found = [column for column in _ANSWERS if column in given]
    if len(found) > 1:
        raise UserError(f"{name}: which is the answer, {' or '.join(found)}? Keep one column")
    if "match" in given:
        match = given["match"]
    if match not in MATCHES:
        raise UserError(
            f"{name}: match = {row_schema.shown_value(match)}: it is one of {', '.join(MATCHES)}"
        )
    if not found:
        return None
    where, listed = f"{name}: {found[0]}", given[found[0]]
    if not isinstance(listed, list | tuple):
        listed = [listed]
    if not listed:
        raise UserError(f"{where} is an empty list; name at least one answer that is right")
    expected = Expected(match, tuple(row_schema.answer_text(value, where) for value in listed))
    check_patterns(expected, where)
    return expected


def _turns(given: dict, reader: _Reader) -> tuple[tuple[Message, ...], bool]:
    """-> turns, and whether they are a prompt as a list, which is read and never learnt."""
    name, named = reader.name, (*_PROMPTS, *_CHATS)
    found = [column for column in named if column in given]
    if not found:
        raise UserError(f"{name}: has no turns; give it one of {', '.join(named)}")
    found = _without_repeated(found, given, reader)
    if found == ["input", "instruction"]:  # Alpaca's
        asked = text(given["instruction"], f"{name}: instruction")
        if not says_nothing(given["input"]):
            asked += "\n\n" + text(given["input"], f"{name}: input")
        return (Message("user", asked),), False
    if len(found) > 1:
        raise UserError(f"{name}: which are its turns, {' or '.join(found)}? Keep one column")
    (column,) = found
    prompted = column == "prompt" and isinstance(given[column], list | tuple)
    if column in _PROMPTS and not prompted:
        return (Message("user", text(given[column], f"{name}: {column}")),), False
    turns = reader.messages(given, column)
    if not turns:
        raise UserError(f"{name}: has no turns: {column} is an empty list")
    if prompted and turns[-1].role == "assistant":
        raise UserError(
            f"{name}: prompt ends with the assistant's message, and no message is continued; if it"
            " is the response, name the list 'messages'"
        )
    return turns, prompted


def _leave_out_joined_text(given: dict, reader: _Reader) -> None:
    """Alpaca's `text` is its other columns in a prompt of words, with the output at the end."""
    if "text" not in given or "instruction" not in given:
        return
    said = [given[c] for c in ("text", "instruction", *_RESPONSES) if c in given]
    texts = [part.strip() for part in said if isinstance(part, str)]
    joined, asked, *answers = texts if len(texts) == len(said) == 3 else ("", "", "")
    before = joined.removesuffix(answers[0])
    if asked and asked in before and before != joined:
        del given["text"]
        reader.unread.add("text (the other columns, joined)")
        return
    raise UserError(
        f"{reader.name}: which are its turns, instruction or text? Keep one column: remove 'text'"
        " if it says the same"
    )


def _without_repeated(found: list[str], given: dict, reader: _Reader) -> list[str]:
    """Without columns that say again how the conversation begins, as ultrachat_200k has one."""
    chats = [column for column in found if column in _CHATS]
    if len(found) == 1 or len(chats) != 1 or not isinstance(given[chats[0]], list | tuple):
        return found
    said = reader.messages(given, chats[0])
    first = next((m.content.strip() for m in said if m.role != "system"), "")

    def repeats(column: str) -> bool:
        value = given[column]
        if column == "prompt" and isinstance(value, list | tuple):
            asked = reader.messages(given, column)
            return bool(asked) and asked == said[: len(asked)]
        return isinstance(value, str) and value.strip() == first != ""

    return [column for column in found if column in chats or not repeats(column)]


def _is_talk(column: str, value: object) -> bool:
    """Whether a response is a list of messages, and not one of answers that are expected."""
    listed = isinstance(value, list | tuple)
    return listed and (column == "completion" or {*map(type, value)} == {dict})


def _answer(
    found: dict, turns: tuple[Message, ...], reader: _Reader
) -> tuple[tuple[Message, ...], Message | None]:
    """The response, of the columns that hold one and the last message, and what is said before it.

    The latter only where the column has a list of messages.
    """
    name = reader.name
    if len(found) > 1:
        raise UserError(f"{name}: which is the response, {' or '.join(found)}? Keep one column")
    before, written = (), None
    for column, value in found.items():
        if not _is_talk(column, value):
            said = row_schema.response_text(value, f"{name}: {column}")
            written = Message("assistant", said)
            continue
        *before, written = reader.messages(found, column) or (None,)
        if written is None or written.role != "assistant":
            raise UserError(f"{name}: {column} has to end with the assistant's message")
        if tuple(before[:1]) == turns[-1:]:
            raise UserError(
                f"{name}: {column} begins with the question, which the turns end with as well; name"
                " it 'messages' if it is the whole conversation, and remove the other column"
            )
    if turns[-1].role != "assistant":
        return tuple(before), written
    if found:
        raise UserError(
            f"{name}: which is the response, the column {next(iter(found))!r} or the last message,"
            " which is from the assistant too? Leave one out"
        )
    return (), turns[-1]
