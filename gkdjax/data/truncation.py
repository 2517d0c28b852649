"""A row that is too long, without its oldest messages.

Whole messages go first, so that templates still work. A round is a message by the user and what
follows up to the user's next one. System messages at the beginning are no round, and are the last
to go.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from absl import logging

from gkdjax.config import Context
from gkdjax.config.checks import PREFIX_KEYS
from gkdjax.data.chat_template import Chat
from gkdjax.data.views import ViewRules
from gkdjax.types import ContextLimit, Example, Message
from gkdjax.utils.errors import UserError
from gkdjax.utils.text import some


def without_prefix_rounds(
    example: Example, excess: Callable[[Example], int], chat: Chat, retained: int = 0
) -> Example | None:
    """The prefix loses its oldest rounds, and then the first message that is left of it its end.

    Args:
      example: the row.
      excess: how many tokens an example is too long; 0 or less: it fits.
      chat: of the prefix, to cut text between two tokens.
      retained: the student reads so many messages at the end of the prefix as well.

    Returns:
      The longest that fits, but for a few tokens; `example` itself if it fits; None if nothing
      would be left that the teacher alone reads.
    """
    prefixes = _shorter_prefixes(example)
    found = _first_fitting([_with(example, prefix=p) for p in prefixes], excess)
    while excess(found) > 0 and found.prefix and not _is_bare(found, example, retained):
        first, *others = found.prefix
        cut = _cut(
            first,
            lambda message, rest=others, row=found: excess(_with(row, prefix=(message, *rest))),
            chat,
            end=True,
        )
        kept = _questions_on(others) if cut is None else (cut, *others)
        found = _with(found, prefix=tuple(kept))
    lost = _is_bare(found, example, retained)
    return None if lost or excess(found) > 0 else found


def without_oldest_rounds(
    example: Example, excess: Callable[[Example], int], chat: Chat, retained: int = 0
) -> Example | None:
    """The prefix loses its oldest rounds, then the turns; then the first message its beginning.

    The round that is answered stays. Arguments and result as of `without_prefix_rounds`.
    """
    shorter = [_with(example, prefix=p) for p in _shorter_prefixes(example)]
    last = shorter[-1]
    shorter += [_with(last, turns=t) for t in _with_fewer_rounds(example.turns, least=1)[1:]]
    found = _first_fitting(shorter, excess)
    while excess(found) > 0 and not _is_bare(found, example, retained):
        part = "prefix" if found.prefix else "turns"
        first, *rest = getattr(found, part)
        cut = _cut(
            first,
            lambda message, rest=rest, row=found, part=part: excess(
                _with(row, **{part: (message, *rest)})
            ),
            chat,
            end=False,
        )
        if cut is None and part == "turns" and (first.role != "system" or not rest):
            return None
        kept = _questions_on(rest) if cut is None and part == "prefix" else rest
        found = _with(found, **{part: tuple(kept if cut is None else (cut, *rest))})
    return None if _is_bare(found, example, retained) else found


def _is_bare(shorter: Example, example: Example, retained: int) -> bool:
    """Whether it has lost what the teacher alone read: it would teach the student to stay so."""
    return len(example.prefix) > retained >= len(shorter.prefix)


def _shorter_prefixes(example: Example) -> list[tuple[Message, ...]]:
    """The prefix, then without its oldest round, and so on; never without all of it."""
    has_system = bool(example.prefix) and example.prefix[0].role == "system"
    return _with_fewer_rounds(example.prefix, least=0 if has_system else 1)


def _questions_on(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages from the first that is no answer whose question has gone."""
    others = (i for i, message in enumerate(messages) if message.role in ("system", "user"))
    return messages[next(others, len(messages)) :]


def _with(example: Example, **changes) -> Example:
    """`example` itself if nothing changes; turns that are gone are no longer counted as given."""
    if all(getattr(example, name) == value for name, value in changes.items()):
        return example
    changed = dataclasses.replace(example, **changes)
    gone = len(example.turns) - len(changed.turns)
    system = min(example.given, _system(changed.turns))  # they stand before what has gone
    return dataclasses.replace(changed, given=max(system, example.given - gone))


def _system(messages: Sequence[Message]) -> int:
    """How many system messages stand at the beginning."""
    others = (i for i, message in enumerate(messages) if message.role != "system")
    return next(others, len(messages))


def _with_fewer_rounds(messages: tuple[Message, ...], least: int) -> list[tuple[Message, ...]]:
    """The messages, then without their oldest round, and so on, until `least` rounds are left."""
    begin = _system(messages)
    later = range(begin + 1, len(messages))
    starts = [begin, *(i for i in later if messages[i].role == "user")]
    if begin < len(messages) and not least:
        starts.append(len(messages))
    return [messages[:begin] + messages[start:] for start in starts]


def _first_fitting(shorter: Sequence[Example], excess: Callable[[Example], int]) -> Example:
    """The first that fits, or the last; each is shorter than the one before."""
    place = bisect.bisect_left(shorter, True, key=lambda example: excess(example) <= 0)
    return shorter[min(place, len(shorter) - 1)]


def _cut(
    message: Message, excess: Callable[[Message], int], chat: Chat, *, end: bool
) -> Message | None:
    """The message without the end, or the beginning, of its text; None if that is not enough."""
    text, spans = message.content, chat.tokenize(message.content)[1]
    left, over = len(spans), excess(message)
    while over > 0:
        left -= over  # the text that is left may be cut into other tokens: look again
        if left <= 0:
            return None
        shown = text[: spans[left - 1][1]].rstrip() if end else text[spans[-left][0] :].lstrip()
        if not shown:
            return None
        message = message._replace(content=shown)
        over = excess(message)
    return message


class Shortened(NamedTuple):
    """What `shortened` has made of the rows."""

    examples: list[Example]
    cut: list[str]  # names of those that lost something
    dropped: list[str]  # and of those that are too long whatever they lose


def shortened(
    purpose: str, examples: Sequence[Example], rules: ViewRules, max_new_tokens: int
) -> Shortened:
    """The rows, cut as "truncate-left" and "truncate-prefix" of `data.too_long` say; logs it.

    A row whose response has to be written leaves room for `max_new_tokens`, but for no more than
    half of what cannot be cut leaves.
    """
    cuts = {
        "truncate-left": without_oldest_rounds,
        "truncate-prefix": without_prefix_rounds,
    }
    if rules.too_long not in cuts:
        return Shortened(list(examples), [], [])
    found, tokens = Shortened([], [], []), 0
    for example in examples:
        room = _room(example, rules, max_new_tokens)
        excess = functools.partial(_excess, rules=rules, room=room)
        shorter = cuts[rules.too_long](example, excess, rules.teacher_chat, rules.retained)
        if shorter is None:
            found.dropped.append(example.name)
            continue
        found.examples.append(shorter)
        if shorter is not example:
            found.cut.append(example.name)
            tokens += excess(example) - excess(shorter)
    if found.cut:
        logging.warning(
            "%s: %d rows longer than data.max_length=%d lost %d tokens in all (%s): %s",
            *(purpose, len(found.cut), rules.max_length, tokens, rules.too_long, some(found.cut)),
        )
    return found


def require_room_beside_prefix(
    purpose: str, examples: Sequence[Example], rules: ViewRules, context: Context
) -> None:
    """Raises UserError if every row is lost because its prefix alone is too long."""
    if rules.too_long not in ("drop", "truncate-right"):
        return
    tokens = []
    for example in examples:
        _, whole = rules.prompts(example)
        asked = example.turns, example.name, example.tools
        bare = rules.teacher_chat.prompt_ids(*asked) if example.prefix else whole
        tokens.append(len(whole) - len(bare))
        if tokens[-1] < rules.max_length:
            return
    if tokens:
        raise UserError(
            f"no row of {purpose} is left: the prefix alone ({_prefix_keys(context)}) has"
            f" {min(tokens)} tokens, and data.max_length = {rules.max_length}. Raise"
            " data.max_length, set data.too_long='truncate-prefix', or shorten the prefix"
        )


def require_contexts(
    examples: Sequence[Example],
    rules: ViewRules,
    room: tuple[str, int],
    contexts: dict[str, ContextLimit],
    *,
    teacher_writes: bool,
) -> None:
    """Raises UserError if a row that is kept is longer than what the model that reads it can read.

    Args:
      examples: of a stream.
      rules: of the same.
      room: of a response that has to be written: the config's key, and its tokens.
      contexts: the student's and the teacher's name -> what it can read.
      teacher_writes: it does so to rows without a response, whatever `data.max_length` is going to
        cut off again.
    """
    key, most = room
    read = [limit.tokens for limit in contexts.values() if limit.tokens is not None]
    written = [limit.written for limit in contexts.values() if limit.written and teacher_writes]
    if min(read, default=rules.max_length) >= rules.max_length:  # rendering takes its time
        if min(written, default=rules.max_length + most) >= rules.max_length + most:
            return
        examples = [example for example in examples if example.answer is None]
    for example in examples:
        new = 0 if example.answer is not None else most
        lengths = rules.lengths(example)
        over = max(0, max(lengths) + new - rules.max_length)
        for length, (name, limit) in zip(lengths, contexts.items(), strict=True):
            where = f"{example.name}: {name} has to read"
            if new and teacher_writes and limit.written and length + new > limit.written:
                left = limit.written - length
                less = f"set {key}={left} or less, " if left > 0 else ""
                raise UserError(
                    f"{where} {length} tokens and to write up to {new}, and both together may be"
                    f" {limit.written} ({limit.source}): {less}shorten the prefix, or serve the"
                    " model with a longer context"
                )
            if over and not new and rules.too_long == "drop":
                continue  # it is not kept
            if limit.tokens is not None and length + new - over > limit.tokens:
                raise UserError(
                    f"{where} {length + new - over} tokens"
                    f"{' with the response to be written' if new else ''}, and it reads"
                    f" {limit.tokens} at most ({limit.source}). Set data.max_length={limit.tokens},"
                    " with data.too_long='truncate-prefix' if such rows are not to be dropped, or"
                    " shorten the prefix"
                )


def _prefix_keys(context: Context) -> str:
    for key in PREFIX_KEYS:
        value = getattr(context, key)
        if value:
            return f"context.{key} = {value}" if isinstance(value, str) else f"context.{key}"
    return "context.history_as_prefix" if context.history_as_prefix else "the rows' prefix_messages"


def _room(example: Example, rules: ViewRules, max_new_tokens: int) -> int:
    """Tokens that are kept free for the response."""
    if example.answer is not None:
        return 0
    free = rules.max_length
    if rules.too_long == "truncate-prefix":
        free -= max(rules.lengths(dataclasses.replace(example, prefix=())))
    return min(max_new_tokens, max(1, free // 2))


def _excess(example: Example, rules: ViewRules, room: int) -> int:
    return max(rules.lengths(example)) + room - rules.max_length
