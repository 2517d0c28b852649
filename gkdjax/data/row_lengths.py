"""Rows that are too long: for `data.max_length`, and for what a model can read."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

from absl import logging

from gkdjax.config import Context
from gkdjax.config_checks import PREFIX_KEYS
from gkdjax.data import shorten
from gkdjax.data.views import ViewRules
from gkdjax.errors import UserError
from gkdjax.types import Example


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
        "truncate-left": shorten.without_oldest_rounds,
        "truncate-prefix": shorten.without_prefix_rounds,
    }
    if rules.too_long not in cuts:
        return Shortened(list(examples), [], [])
    found, tokens = Shortened([], [], []), 0
    for example in examples:
        room = _room(example, rules, max_new_tokens)
        excess = functools.partial(_excess, rules=rules, room=room)
        shorter = cuts[rules.too_long](example, excess, rules.teacher_chat)
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


def some(names: Sequence[str]) -> str:
    """The first few, for people."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


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


class Limit(NamedTuple):
    """How many tokens a model can read."""

    tokens: int | None  # None: nobody says
    source: str  # what says so, for people
    written: int | None = None  # with what it writes itself: a server ends or refuses there


def require_contexts(
    examples: Sequence[Example],
    rules: ViewRules,
    room: tuple[str, int],
    contexts: dict[str, Limit],
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
