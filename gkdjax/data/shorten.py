"""A row that is too long, without its oldest messages.

Whole messages go first, so that templates still work. A round is a message by the user and what
follows up to the user's next one. System messages at the beginning are no round, and are the last
to go.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

from gkdjax.data.chat import Chat
from gkdjax.types import Example, Message


def without_prefix_rounds(
    example: Example, excess: Callable[[Example], int], chat: Chat
) -> Example | None:
    """The prefix loses its oldest rounds, and then the first message that is left of it its end.

    Args:
      example: the row.
      excess: how many tokens an example is too long; 0 or less: it fits.
      chat: of the prefix, to cut text between two tokens.

    Returns:
      The longest that fits, but for a few tokens; `example` itself if it fits; None if nothing of
      the prefix would be left.
    """
    prefixes = _shorter_prefixes(example)
    found = _first_fitting([_with(example, prefix=p) for p in prefixes], excess)
    while excess(found) > 0 and found.prefix:
        first, *others = found.prefix
        cut = _cut(
            first,
            lambda message, rest=others, row=found: excess(_with(row, prefix=(message, *rest))),
            chat,
            end=True,
        )
        kept = _questions_on(others) if cut is None else (cut, *others)
        found = _with(found, prefix=tuple(kept))
    # A row whose teacher reads no more than its student would teach it to stay as it is.
    lost = bool(example.prefix) and not found.prefix
    return None if lost or excess(found) > 0 else found


def without_oldest_rounds(
    example: Example, excess: Callable[[Example], int], chat: Chat
) -> Example | None:
    """The prefix loses its oldest rounds, then the turns; then the first message its beginning.

    The round that is answered stays. Arguments and result as of `without_prefix_rounds`.
    """
    shorter = [_with(example, prefix=p) for p in _shorter_prefixes(example)]
    last = shorter[-1]
    shorter += [_with(last, turns=t) for t in _with_fewer_rounds(example.turns, least=1)[1:]]
    found = _first_fitting(shorter, excess)
    while excess(found) > 0:
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
        if example.prefix and not found.prefix:
            return None  # a row whose teacher reads no more than its student teaches nothing
    return found


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
    text, spans = message.content, chat.character_spans(message.content)
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
