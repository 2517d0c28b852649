"""Rows that are too long lose their oldest messages, or are refused.

Whole rounds go first, so that templates still work: a message by the user and all up to the user's
next one. System messages at the beginning belong to no round, and go last.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Sequence

from gkdjax.config import Context
from gkdjax.config.schema import PREFIX_KEYS
from gkdjax.data.chat_template import Chat
from gkdjax.data.row_schema import leading_system
from gkdjax.data.views import ViewRules
from gkdjax.types import ContextLimit, Example, Message
from gkdjax.utils.errors import UserError


def shortened(example: Example, rules: ViewRules, max_new_tokens: int) -> Example | None:
    """The row, cut as "truncate-left" and "truncate-prefix" of `data.too_long` say; None: dropped.

    A row without a response leaves room for one of `max_new_tokens`, but at most for half of the
    tokens beside the messages that cannot be cut.
    """
    if rules.too_long not in ("truncate-left", "truncate-prefix"):
        return example
    room = 0
    if example.answer is None:
        free = rules.max_length
        if rules.too_long == "truncate-prefix":
            free -= max(rules.lengths(dataclasses.replace(example, prefix=())))
        room = min(max_new_tokens, max(1, free // 2))

    def excess(row: Example) -> int:
        return max(rules.lengths(row)) + room - rules.max_length

    cut = without_oldest_rounds if rules.too_long == "truncate-left" else without_prefix_rounds
    return cut(example, excess, rules.teacher_chat, rules.retained)


def without_prefix_rounds(
    example: Example, excess: Callable[[Example], int], chat: Chat, retained: int = 0
) -> Example | None:
    """The prefix without its oldest rounds, and then without the end of its first message.

    `excess` says how many tokens a row has too many; `retained` messages at the end of the prefix
    are the student's as well. The result is the longest that fits, give or take a few tokens;
    `example` itself if it fits; None if nothing would be left that the teacher alone reads.
    """
    found = _first_fitting(_shorter_prefixes(example), excess)
    while excess(found) > 0 and found.prefix and not _is_bare(found, example, retained):
        found = _without_first(found, "prefix", excess, chat, end=True)
    return None if excess(found) > 0 or _is_bare(found, example, retained) else found


def without_oldest_rounds(
    example: Example, excess: Callable[[Example], int], chat: Chat, retained: int = 0
) -> Example | None:
    """The prefix and then the turns without their oldest rounds; then the first text's beginning.

    The last round of the turns stays. See `without_prefix_rounds`.
    """
    shorter = _shorter_prefixes(example)
    turns = _with_fewer_rounds(example.turns, least=1)[1:]
    found = _first_fitting([*shorter, *(_replace(shorter[-1], turns=t) for t in turns)], excess)
    while excess(found) > 0 and not _is_bare(found, example, retained):
        cut = _without_first(found, "prefix" if found.prefix else "turns", excess, chat, end=False)
        is_gone = len(cut.turns) < len(found.turns)
        if is_gone and (found.turns[0].role != "system" or not cut.turns):
            return None
        found = cut
    return None if _is_bare(found, example, retained) else found


def _without_first(
    row: Example, part: str, excess: Callable[[Example], int], chat: Chat, *, end: bool
) -> Example:
    """The row whose `part` loses the end, or the beginning, of its first message.

    If that is not enough, the whole message goes, and from a prefix the answers to it.
    """
    first, *rest = getattr(row, part)
    text, spans = first.content, chat.tokenize(first.content)[1]
    found, left = row, len(spans)
    while (over := excess(found)) > 0:
        left -= over  # the remaining text may be split into other tokens: measure it again
        cut = ""
        if left > 0:
            cut = text[: spans[left - 1][1]].rstrip() if end else text[spans[-left][0] :].lstrip()
        if not cut:
            if part == "prefix":
                rest = itertools.dropwhile(lambda m: m.role not in ("system", "user"), rest)
            return _replace(row, **{part: tuple(rest)})
        found = _replace(row, **{part: (first._replace(content=cut), *rest)})
    return found


def _is_bare(shorter: Example, example: Example, retained: int) -> bool:
    """Whether it lost what the teacher alone read: it would teach the student to stay as it is."""
    return len(example.prefix) > retained >= len(shorter.prefix)


def _shorter_prefixes(example: Example) -> list[Example]:
    """The row, then without the oldest round of its prefix, and so on; never without all of it."""
    has_system = bool(example.prefix) and example.prefix[0].role == "system"
    prefixes = _with_fewer_rounds(example.prefix, least=0 if has_system else 1)
    return [_replace(example, prefix=prefix) for prefix in prefixes]


def _with_fewer_rounds(messages: tuple[Message, ...], least: int) -> list[tuple[Message, ...]]:
    """The messages, then without their oldest round, and so on, until `least` rounds are left."""
    begin = leading_system(messages)
    later = range(begin + 1, len(messages))
    starts = [begin, *(i for i in later if messages[i].role == "user")]
    if begin < len(messages) and not least:
        starts.append(len(messages))
    return [messages[:begin] + messages[start:] for start in starts]


def _first_fitting(shorter: Sequence[Example], excess: Callable[[Example], int]) -> Example:
    """The first that fits, or the last; each is shorter than the one before."""
    place = bisect.bisect_left(shorter, True, key=lambda example: excess(example) <= 0)
    return shorter[min(place, len(shorter) - 1)]


def _replace(example: Example, **changes) -> Example:
    """`example` itself if nothing changes; turns that are gone no longer count as given."""
    if all(getattr(example, name) == value for name, value in changes.items()):
        return example
    changed = dataclasses.replace(example, **changes)
    gone = len(example.turns) - len(changed.turns)
    system = min(example.given, leading_system(changed.turns))  # they stand before what has gone
    return dataclasses.replace(changed, given=max(system, example.given - gone))


def require_room_beside_prefix(
    purpose: str, examples: Sequence[Example], rules: ViewRules, context: Context
) -> None:
    """Raises UserError if every row is lost because its prefix alone is too long."""
    if rules.too_long not in ("drop", "truncate-right") or not examples:
        return
    tokens = []
    for example in examples:
        _, whole = rules.prompts(example)
        asked = example.turns, example.name, example.tools
        bare = rules.teacher_chat.prompt_ids(*asked) if example.prefix else whole
        tokens.append(len(whole) - len(bare))
        if tokens[-1] < rules.max_length:
            return
    keys = (*PREFIX_KEYS, "history_as_prefix")
    key = next((key for key in keys if getattr(context, key)), None)
    where = "the rows' prefix_messages" if key is None else f"context.{key}"
    if key is not None and isinstance(getattr(context, key), str):
        where += f" = {getattr(context, key)}"
    raise UserError(
        f"no row of {purpose} is left: the prefix alone ({where}) has {min(tokens)} tokens, and"
        f" data.max_length = {rules.max_length}. Raise data.max_length, set"
        " data.too_long='truncate-prefix', or shorten the prefix"
    )


def require_contexts(
    examples: Sequence[Example],
    rules: ViewRules,
    room: tuple[str, int],
    contexts: dict[str, ContextLimit],
    *,
    teacher_writes: bool,
) -> None:
    """Raises UserError if a row that stays is longer than the context of a model that reads it.

    `room` is the config's key for the length of a response that has to be written, and its tokens;
    `contexts` has the student's and the teacher's limit by their names. A teacher that writes does
    not know what `data.max_length` cuts off later.
    """
    (key, most), longest = room, rules.max_length
    read = [limit.tokens for limit in contexts.values() if limit.tokens is not None]
    written = [limit.written for limit in contexts.values() if limit.written and teacher_writes]
    if min(read, default=longest) >= longest:  # rendering takes time
        if min(written, default=longest + most) >= longest + most:
            return
        examples = [example for example in examples if example.answer is None]
    for example in examples:
        new = 0 if example.answer is not None else most
        lengths = rules.lengths(example)
        over = max(0, max(lengths) + new - longest)
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
                continue
            if limit.tokens is not None and length + new - over > limit.tokens:
                raise UserError(
                    f"{where} {length + new - over} tokens"
                    f"{' with the response to be written' if new else ''}, and it reads"
                    f" {limit.tokens} at most ({limit.source}). Set data.max_length={limit.tokens},"
                    " with data.too_long='truncate-prefix' if such rows are not to be dropped, or"
                    " shorten the prefix"
                )
