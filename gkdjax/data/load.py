"""The rows of a run: what is trained, anchored and asked, each with its prefix."""

import collections
import dataclasses
import itertools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from absl import logging

from gkdjax.config import Config, anchor_sets
from gkdjax.data.conversations import history_as_prefix
from gkdjax.data.examples import BadRows, read_examples
from gkdjax.data.prefix import read_prefix
from gkdjax.data.row_schema import ROLES, TOOL_ROLES
from gkdjax.types import Example, Message
from gkdjax.utils import seeds
from gkdjax.utils.errors import UserError
from gkdjax.utils.text import some

# Rows beside the task -> why none of them may be a row of it.
_ANCHOR = "an anchor row", "the anchor would hold the student back from learning it"
_RETENTION = (
    "a question of a retention set",
    "what it shows would not be kept, but baked; it belongs into eval.questions",
)
_SIDE_EFFECT = "a prompt for side effects", "that the student changes there is what is wanted"


class Examples(NamedTuple):
    """All rows, read and checked, before any tokenizer has seen them."""

    train: list[Example]
    validation: list[Example]  # as those that are trained; or []
    anchors: dict[str, list[Example]]  # by name, see `config.anchor_sets`
    questions: list[Example]  # of the baked task, with answers; or []
    heldout: list[Example]  # more of them, asked before and after alone; or []
    prompts: list[Example]  # for divergences: the questions, if there are no others; or []
    retention: dict[str, list[Example]]  # name -> questions that are asked as they stand
    side_effects: list[Example]  # unrelated prompts, as they stand; or []
    dropped: dict[str, list[str]]  # the config's key -> names of rows that could not be used


def load_examples(config: Config, bad_rows: BadRows | None = None) -> Examples:
    """Reads every file and dataset that the config names; `bad_rows` takes in unusable rows.

    Raises:
      UserError: naming the file or key, the row, the field, and what is wrong with it.
    """
    c, prefix = config.eval, read_prefix(config.context)
    loader = _Loader(config, prefix, bad_rows or BadRows(config.data.bad_rows))
    train, validation = loader.train_and_validation()
    _check_roles(config, train)
    questions = _answered(loader.baked(c.questions, "eval.questions"))
    heldout = _answered(loader.baked(c.heldout, "eval.heldout"))
    _check_apart(heldout, train, "data.train")
    _check_apart(heldout, questions, "eval.questions")
    prompts = loader.baked(c.prompts, "eval.prompts")
    baked = {prefix, *(row.prefix for row in (*train, *questions, *heldout, *prompts))} - {()}
    trained = {row.turns for row in train}

    def read_unrelated(source, key: str, what: tuple[str, str]) -> list[Example]:
        rows = loader.read(source, key, question=what is not _ANCHOR)
        return _unrelated(_answered(rows) if what is _RETENTION else rows, baked, trained, what)

    retention = {
        name: read_unrelated(source, f"eval.retention.{name}", _RETENTION)
        for name, source in c.retention.items()
    }
    anchors = {
        each.name: read_unrelated(each.data, each.key, _ANCHOR)
        for each in anchor_sets(config.anchor)
    }
    side_effects = in_turn(retention)
    if c.side_effects is not None:
        side_effects = read_unrelated(c.side_effects, "eval.side_effects", _SIDE_EFFECT)
    return Examples(
        *(train, validation, anchors, questions, heldout, prompts or questions),
        *(retention, side_effects, loader.bad_rows.dropped),
    )


def fingerprints(examples: Examples) -> dict[str, dict[str, int]]:
    """Set that is asked -> {"rows", "crc32" of their content}: equal in comparable runs."""
    sets = {
        "questions": examples.questions,
        "heldout": examples.heldout,
        "prompts": [] if examples.prompts is examples.questions else examples.prompts,
        "validation": examples.validation,
        "side_effects": examples.side_effects,
    } | {f"retention.{name}": rows for name, rows in examples.retention.items()}
    if examples.side_effects == in_turn(examples.retention):
        del sets["side_effects"]
    return {
        name: {"rows": len(rows), "crc32": zlib.crc32(repr([_content(r) for r in rows]).encode())}
        for name, rows in sets.items()
        if rows
    }


def _content(row: Example) -> tuple:
    """Without its name: the same rows may stand in another file."""
    messages = [*row.prefix, *row.turns, *([] if row.answer is None else [row.answer])]
    beside = [(message.fields, message.learn) for message in messages] + [row.tools]
    plain = beside == [("", True)] * len(messages) + [""]  # rows without such keep their number
    texts = (tuple(message[:2] for message in part) for part in (row.prefix, row.turns))
    return *texts, row.response, row.expected, *(() if plain else (beside,))


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Reads the sources of a run."""

    config: Config
    prefix: tuple[Message, ...]  # the global one
    bad_rows: BadRows

    def read(self, source, key: str, *, question: bool = False) -> list[Example]:
        """Rows to train on, or questions and prompts of the evaluation, as they stand."""
        match = self.config.eval.match if question else None
        roles = self.config.context.target_roles
        return read_examples(source, key, match=match, roles=roles, bad_rows=self.bad_rows)

    def baked(self, source, key: str) -> list[Example]:
        """Questions and prompts with the prefix that is baked; [] without a source."""
        rows = [] if source is None else self.read(source, key, question=True)
        return self.with_prefix(rows, key, last_only=True) if rows else []

    def with_prefix(self, rows: list[Example], key: str, last_only: bool = False) -> list[Example]:
        """Rows with their history as the prefix, if wanted; a row's own prefix stays."""
        if self.config.context.history_as_prefix:
            roles = self.config.context.target_roles
            rows = history_as_prefix(rows, key, roles, self.bad_rows, last_only=last_only)
        return [dataclasses.replace(row, prefix=row.prefix or self.prefix) for row in rows]

    def train_and_validation(self) -> tuple[list[Example], list[Example]]:
        """Both sets of rows; a conversation is in one of them, with all of its history."""
        validation = self.config.data.validation
        train, held = self.read(self.config.data.train, "data.train"), []
        if isinstance(validation, float):
            train, held = _split(train, validation)
        elif validation is not None:
            held = self.read(validation, "data.validation")
        train = self.with_prefix(train, "data.train")
        held = self.with_prefix(held, "data.validation") if held else []
        trained = {(row.prefix, row.turns) for row in train}
        both = [row.name for row in held if (row.prefix, row.turns) in trained]
        if both:
            logging.warning(
                "data.validation: %d rows ask what a row of data.train asks, so their loss says"
                " little: %s",
                *(len(both), some(both)),
            )
        return train, held


def _split(rows: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(the rest, about `share` of the rows), both in order; at least one row each.

    The seed of the run changes nothing: runs with other seeds are compared on the same rows.
    """
    if len(rows) < 2:
        where = f"config.data.validation = {share}"
        raise UserError(f"{where}: data.train has a single row; name rows of their own")
    count = min(max(round(share * len(rows)), 1), len(rows) - 1)
    held = set(seeds.generator(0, "data.validation").permutation(len(rows))[:count].tolist())
    parts: tuple[list[Example], list[Example]] = ([], [])
    for place, row in enumerate(rows):
        parts[place in held].append(row)
    logging.info("data.validation: %d of the %d rows of data.train", count, len(rows))
    return parts


def _check_roles(config: Config, train: Sequence[Example]) -> None:
    """Raises UserError for a role in `context.target_roles` that no message can have."""
    # A response, and one that is still to be written, is the assistant's.
    counts = collections.Counter({"assistant": len(train)})
    for example in train:
        counts.update({turn.role for turn in example.turns if turn.role != "assistant"})
    source = config.data.train
    where = f"data.train = {source}" if isinstance(source, str) else "data.train"
    for role in config.context.target_roles:
        known, names = ROLES.get(role.lower()), f"config.context.target_roles names {role!r}"
        if role in TOOL_ROLES:
            raise UserError(f"{names}: results of tools are never learnt; take it out")
        if known not in (None, role):
            raise UserError(f"{names}, which rows are read as {known!r}: write that")
        if role not in counts:
            there = ", ".join(f"{role} (in {rows} rows)" for role, rows in counts.items())
            raise UserError(
                f"{names}, and no message of {where} has that role; there are {there}. A prefix is"
                " never trained"
            )


def _unrelated(
    rows: Sequence[Example], baked: set, trained: set, what: tuple[str, str]
) -> list[Example]:
    """Rows beside the task: both views read all of a row, its own prefix included."""
    made, (kind, why_not) = [], what
    for row in rows:
        turns = row.prefix + row.turns
        if any(turns[:length] in baked for length in range(1, len(turns) + 1)):
            raise UserError(
                f"{row.name}: {kind} carries the prefix that is being baked; {why_not}. Remove it"
            )
        if turns in trained:
            raise UserError(
                f"{row.name}: {kind} is a row of data.train as well, which changes the student"
                " there. Remove it from one of them"
            )
        made.append(dataclasses.replace(row, prefix=(), turns=turns))
    return made


def _answered(rows: list[Example]) -> list[Example]:
    for row in rows:
        if row.expected is None:
            raise UserError(
                f"{row.name}: a question for the evaluation needs an 'answer': a string, or a list"
                " of strings any of which is right. Prompts without answers are eval.prompts"
            )
    return rows


def _check_apart(heldout: list[Example], others: list[Example], where: str) -> None:
    """Raises UserError for a held-out question that is one of the others."""
    names = {(row.prefix, row.turns): row.name for row in others}
    for row in heldout:
        if (row.prefix, row.turns) in names:
            raise UserError(
                f"{row.name}: a question of eval.heldout is a row of {where} as well"
                f" ({names[row.prefix, row.turns]}); remove it from one of them"
            )


def in_turn(sets: dict[str, list[Example]]) -> list[Example]:
    """All questions, a row of each set in turn: so the first few are of every set."""
    rounds = itertools.zip_longest(*sets.values())
    return [row for each in rounds for row in each if row is not None]
