"""The rows of a run: what is trained, anchored and asked, each with its prefix."""

import collections
import dataclasses
import itertools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from absl import logging

from gkdjax.config import Config, anchor_sets
from gkdjax.data.bad_rows import BadRows
from gkdjax.data.conversations import history_as_prefix
from gkdjax.data.examples import read_examples
from gkdjax.data.prefix import read_prefix
from gkdjax.data.row_schema import TOOL_ROLES, known_role
from gkdjax.types import Example, Message
from gkdjax.utils import seeds
from gkdjax.utils.errors import UserError
from gkdjax.utils.text import some


class Examples(NamedTuple):
    """All of them read and checked, before any tokenizer has seen them."""

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
    """Reads every file and dataset that the config names.

    Args:
      config: of the run.
      bad_rows: takes in the rows that cannot be used; None: as `data.bad_rows` has it.

    Raises:
      UserError: naming the file or key, the row, the field, and what is wrong with it.
    """
    prefix = read_prefix(config.context)
    bad_rows = BadRows(config.data.bad_rows) if bad_rows is None else bad_rows
    reader = _Reader(config, prefix, bad_rows)
    train, validation = _train_and_validation(config, reader)
    _check_roles(config, train)
    questions = _answered(reader.baked(config.eval.questions, "eval.questions"))
    heldout = _answered(reader.baked(config.eval.heldout, "eval.heldout"))
    _check_apart(heldout, train, questions)
    prompts = reader.baked(config.eval.prompts, "eval.prompts")
    baked = {prefix, *(row.prefix for row in (*train, *questions, *heldout, *prompts))} - {()}
    abilities = _abilities(config, reader, baked, train)
    return Examples(
        train=train,
        validation=validation,
        anchors=_anchors(config, reader, baked, train),
        questions=questions,
        heldout=heldout,
        prompts=prompts or questions,
        retention=abilities,
        side_effects=_side_effects(config, reader, abilities, baked, train),
        dropped=bad_rows.dropped,
    )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the sources of a run."""

    config: Config
    prefix: tuple[Message, ...]  # the global one
    bad_rows: BadRows

    def rows(self, source, key: str) -> list[Example]:
        """Rows to train on, as they stand."""
        roles = self.config.context.target_roles
        return read_examples(source, key, roles=roles, bad_rows=self.bad_rows)

    def asked(self, source, key: str) -> list[Example]:
        """Questions and prompts of the evaluation, as they stand."""
        roles, match = self.config.context.target_roles, self.config.eval.match
        return read_examples(source, key, match=match, roles=roles, bad_rows=self.bad_rows)

    def baked(self, source, key: str) -> list[Example]:
        """Questions and prompts with the prefix that is baked; [] without a source."""
        if source is None:
            return []
        return self.with_prefix(self.asked(source, key), key, last_only=True)

    def with_prefix(
        self, rows: list[Example], key: str, *, last_only: bool = False
    ) -> list[Example]:
        """With their history as the prefix, if wanted; a row's own wins over the global one."""
        if self.config.context.history_as_prefix:
            roles = self.config.context.target_roles
            rows = history_as_prefix(rows, key, roles, self.bad_rows, last_only=last_only)
        return _with_prefix(rows, self.prefix)


def fingerprints(examples: Examples) -> dict[str, dict[str, int]]:
    """What makes runs comparable: of each set that is asked, {"rows", "crc32" of their content}."""
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
    said = [*row.prefix, *row.turns, *([] if row.answer is None else [row.answer])]
    beside = [(message.fields, message.learn) for message in said] + [row.tools]
    plain = beside == [("", True)] * len(said) + [""]  # as every row was once: its number stays
    texts = (tuple(message[:2] for message in part) for part in (row.prefix, row.turns))
    return *texts, row.response, row.expected, *(() if plain else (beside,))


def _train_and_validation(config: Config, reader: _Reader) -> tuple[list[Example], list[Example]]:
    """Conversations stay whole: what is said in one is not in the other's history."""
    train = reader.rows(config.data.train, "data.train")
    validation = config.data.validation
    if isinstance(validation, float):
        train, held = _split(train, validation)
    elif validation is not None:
        held = reader.rows(validation, "data.validation")
    else:
        held = []
    train = reader.with_prefix(train, "data.train")
    if not held:
        return train, []
    held = reader.with_prefix(held, "data.validation")
    trained = {(row.prefix, row.turns) for row in train}
    both = [row.name for row in held if (row.prefix, row.turns) in trained]
    if both:
        logging.warning(
            "data.validation: %d rows ask what a row of data.train asks, so their loss says little:"
            " %s",
            *(len(both), some(both)),
        )
    return train, held


def _split(rows: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(the rest, about `share` of the rows), both in order; at least one row each.

    Whatever the seed of the run is: runs with other seeds are compared on the same rows.
    """
    if len(rows) < 2:
        raise UserError(
            f"config.data.validation = {share}: data.train has a single row, which cannot be"
            " divided; name rows of their own"
        )
    count = min(max(round(share * len(rows)), 1), len(rows) - 1)
    drawn = seeds.generator(0, "data.validation").permutation(len(rows))
    held = set(drawn[:count].tolist())
    parts: tuple[list[Example], list[Example]] = ([], [])
    for place, row in enumerate(rows):
        parts[place in held].append(row)
    logging.info("data.validation: %d of the %d rows of data.train", count, len(rows))
    return parts


def _check_roles(config: Config, train: Sequence[Example]) -> None:
    """Raises UserError for a role to be trained that nobody has: it would be missed in silence."""
    # A response, and one that is still to be written, is the assistant's.
    counts = collections.Counter({"assistant": len(train)})
    for example in train:
        counts.update({turn.role for turn in example.turns if turn.role != "assistant"})
    source = config.data.train
    where = f"data.train = {source}" if isinstance(source, str) else "data.train"
    for role in config.context.target_roles:
        if role in TOOL_ROLES:
            raise UserError(
                f"config.context.target_roles names {role!r}: results of tools are never learnt;"
                " take it out"
            )
        known = known_role(role)
        if known not in (None, role):
            raise UserError(
                f"config.context.target_roles names {role!r}, which rows are read as {known!r}:"
                " write that"
            )
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
    config: Config, reader: _Reader, baked: set, train: Sequence[Example]
) -> dict[str, list[Example]]:
    return {
        each.name: _unrelated(reader.rows(each.data, each.key), baked, train, "an anchor row")
        for each in anchor_sets(config.anchor)
    }


_WHY_NOT = {
    "an anchor row": "the anchor would hold the student back from learning it",
    "a question of a retention set": "what it shows would not be kept, but baked; it belongs into"
    " eval.questions",
    "a prompt for side effects": "that the student changes there is what is wanted",
}


def _unrelated(
    examples: Sequence[Example], baked: set, train: Sequence[Example], what: str
) -> list[Example]:
    """Rows beside the task: both views read all of a row, its own prefix included."""
    trained = {example.turns for example in train}
    rows = []
    for row in examples:
        conversation = (*row.prefix, *row.turns)
        if any(conversation[:length] in baked for length in range(1, len(conversation) + 1)):
            raise UserError(
                f"{row.name}: {what} carries the prefix that is being baked; {_WHY_NOT[what]}."
                " Remove the row"
            )
        if conversation in trained:
            raise UserError(
                f"{row.name}: {what} is a row of data.train as well, which changes the student"
                " there. Remove it from one of them"
            )
        rows.append(dataclasses.replace(row, prefix=(), turns=conversation))
    return rows


def _answered(rows: list[Example]) -> list[Example]:
    for row in rows:
        if row.expected is None:
            raise UserError(
                f"{row.name}: a question for the evaluation needs an 'answer': a string, or a list"
                " of strings any of which is right. Prompts without answers are eval.prompts"
            )
    return rows


def _check_apart(heldout: list[Example], train: list[Example], asked: list[Example]) -> None:
    """Raises UserError for a held-out question that is not held out."""
    for rows, where in ((train, "data.train"), (asked, "eval.questions")):
        there = {(row.prefix, row.turns): row.name for row in rows}
        for row in heldout:
            if (row.prefix, row.turns) in there:
                raise UserError(
                    f"{row.name}: a question of eval.heldout is a row of {where} as well"
                    f" ({there[row.prefix, row.turns]}); remove it from one of them"
                )


def _abilities(
    config: Config, reader: _Reader, baked: set, train: Sequence[Example]
) -> dict[str, list[Example]]:
    found, what = {}, "a question of a retention set"
    for name, source in config.eval.retention.items():
        rows = reader.asked(source, f"eval.retention.{name}")
        found[name] = _unrelated(_answered(rows), baked, train, what)
    return found


def _side_effects(
    config: Config,
    reader: _Reader,
    abilities: dict[str, list[Example]],
    baked: set,
    train: Sequence[Example],
) -> list[Example]:
    what, source = "a prompt for side effects", config.eval.side_effects
    if source is None:
        return in_turn(abilities)
    return _unrelated(reader.asked(source, "eval.side_effects"), baked, train, what)


def in_turn(abilities: dict[str, list[Example]]) -> list[Example]:
    """All questions, a row of each set in turn: so the first few are of every set."""
    rounds = itertools.zip_longest(*abilities.values())
    return [row for each in rounds for row in each if row is not None]
