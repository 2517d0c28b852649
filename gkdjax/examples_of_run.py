"""The rows of a run: what is trained, anchored and asked, each with its prefix."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from gkdjax.config import Config, anchor_sets
from gkdjax.data.history import history_as_prefix
from gkdjax.data.prefixes import read_prefix
from gkdjax.data.sources import read_examples
from gkdjax.errors import UserError
from gkdjax.types import Example, Message


class Examples(NamedTuple):
    """All of them read and checked, before any tokenizer has seen them."""

    train: list[Example]
    anchors: dict[str, list[Example]]  # by name, see `config.anchor_sets`
    questions: list[Example]  # of the baked task, with answers; or []
    held_out: list[Example]  # prompts for divergences, or []
    abilities: dict[str, list[Example]]  # name -> questions that are asked as they stand


def read(config: Config) -> Examples:
    """Reads every file and dataset that the config names.

    Raises:
      UserError: naming the file or key, the row, the field, and what is wrong with it.
    """
    prefix = read_prefix(config.context)
    train = read_examples(config.data.train, "data.train")
    if config.context.history_as_prefix:
        train = history_as_prefix(train, "data.train")
    train = _with_prefix(train, prefix)
    _check_roles(config, train)
    return Examples(
        train=train,
        anchors=_anchors(config, prefix, train),
        questions=_baked(config, config.eval.questions, "eval.questions", prefix),
        held_out=_baked(config, config.eval.held_out, "eval.held_out", prefix),
        abilities=_abilities(config),
    )


def _check_roles(config: Config, train: Sequence[Example]) -> None:
    """Raises UserError for a role to be trained that nobody has: it would be missed in silence."""
    # A response, and one that is still to be written, is the assistant's.
    counts = collections.Counter({"assistant": len(train)})
    for example in train:
        counts.update({turn.role for turn in example.turns if turn.role != "assistant"})
    source = config.data.train
    where = f"data.train = {source}" if isinstance(source, str) else "data.train"
    for role in config.context.target_roles:
        if role not in counts:
            there = ", ".join(f"{role} (in {rows} rows)" for role, rows in counts.items())
            raise UserError(
                f"config.context.target_roles names {role!r}, and no message of {where} has that"
                f" role; there are {there}. A prefix is never trained"
            )


def _with_prefix(examples: Sequence[Example], prefix: tuple[Message, ...]) -> list[Example]:
    """A row's own prefix wins over the global one; an empty one does not."""
    return [dataclasses.replace(e, prefix=e.prefix or prefix) for e in examples]


def _anchors(
    config: Config, prefix: tuple[Message, ...], train: Sequence[Example]
) -> dict[str, list[Example]]:
    baked = {prefix, *(example.prefix for example in train)} - {()}
    trained = {example.turns for example in train}
    return {
        each.name: _anchor(read_examples(each.data, each.key), baked, trained)
        for each in anchor_sets(config.anchor)
    }


def _anchor(examples: Sequence[Example], baked: set, trained: set) -> list[Example]:
    """Anchor rows: both views read all of a row, its own prefix included."""
    rows = []
    for row in examples:
        conversation = (*row.prefix, *row.turns)
        if any(conversation[:length] in baked for length in range(1, len(conversation) + 1)):
            raise UserError(
                f"{row.name}: an anchor row carries the prefix that is being baked; the anchor"
                " would hold the student back from learning it. Remove the row"
            )
        if conversation in trained:
            raise UserError(
                f"{row.name}: an anchor row is a row of data.train as well; the two losses would"
                " pull against each other. Remove it from one of them"
            )
        rows.append(dataclasses.replace(row, prefix=(), turns=conversation))
    return rows


def _questions(source: str | tuple[dict, ...] | None, key: str) -> list[Example]:
    return [] if source is None else read_examples(source, key, questions=True)


def _baked(config: Config, source, key: str, prefix: tuple[Message, ...]) -> list[Example]:
    rows = _questions(source, key)
    if rows and config.context.history_as_prefix:
        rows = history_as_prefix(rows, key, last_only=True)
    return _with_prefix(rows, prefix)


def _abilities(config: Config) -> dict[str, list[Example]]:
    found = {
        name: _questions(path, f"eval.retention.{name}")
        for name, path in config.eval.retention.items()
    }
    if config.eval.other_prefixes is not None:
        found["other_prefixes"] = _questions(config.eval.other_prefixes, "eval.other_prefixes")
    return found
