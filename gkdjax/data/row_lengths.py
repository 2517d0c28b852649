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
        bare = (
            rules.teacher_chat.prompt_ids(example.turns, example.name) if example.prefix else whole
        )
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
    max_new_tokens: int,
    contexts: dict[str, int | None],
) -> None:
    """Raises UserError if a row that is kept is longer than what the model that reads it can read.

    Args:
      examples: of a stream.
      rules: of the same.
      max_new_tokens: of a response that has to be written.
      contexts: the student's and the teacher's name -> tokens that it can read at most, or None.
    """
    shortest = min((c for c in contexts.values() if c is not None), default=rules.max_length)
    if shortest >= rules.max_length:
        return
    for example in examples:
        room = 0 if example.answer is not None else max_new_tokens
        lengths = rules.lengths(example)
        over = max(0, max(lengths) + room - rules.max_length)
        if over and not room and rules.too_long == "drop":
            continue  # it is not kept
        for length, (name, context) in zip(lengths, contexts.items(), strict=True):
            if context is not None and length + room - over > context:
                raise UserError(
                    f"{example.name}: {name} has to read {length + room - over} tokens"
                    f"{' with the response to be written' if room else ''}, and its context"
                    f" (max_position_embeddings in its config.json) is {context}. Set"
                    f" data.max_length={context}, with data.too_long='truncate-prefix' if such rows"
                    " are not to be dropped, or shorten the prefix"
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
