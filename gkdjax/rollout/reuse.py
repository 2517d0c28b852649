"""Responses of an earlier run, taken over by this one: `rollout.reuse`."""

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Sequence

from absl import logging

from gkdjax.data.chat_template import Chat
from gkdjax.data.dataset import RolloutFilter
from gkdjax.data.views import RowStatus
from gkdjax.rollout import files
from gkdjax.types import Completion, Prompt, TokenTopK
from gkdjax.utils.errors import UserError

_ADVICE = "mend it, or name another file in config.rollout.reuse"


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of responses, and whose predictions on them would be those of this run's teacher.

    Attributes:
      path: a RUN/trajectories_*.jsonl.
      teacher: the description of this run's; what another one kept is of no use.
      top_k: the K of its predictions; None: it gives no top k.
      temperature: of its predictions.
      vocab_size: of the ids that both models have.
      text_alone: text without such predictions will do: the teacher can read it.
    """

    path: pathlib.Path
    teacher: str
    top_k: int | None
    temperature: float
    vocab_size: int
    text_alone: bool

    def responses(
        self, asked: Sequence[Prompt], rules: RolloutFilter, chat: Chat
    ) -> dict[int, Completion]:
        """Place in `asked` -> the response that the file has for the same prompt and number.

        Of equal prompts each takes one of its own, in the order of the file. What `rules` would not
        accept from the teacher, whose chat it is, is left for the teacher to write.

        Raises:
          UserError: the file is missing or damaged, fits no row, or has ids that no model knows.
        """
        if not self.path.is_file():
            raise UserError(f"config.rollout.reuse: there is no file {self.path}")
        records = files.read(self.path, _ADVICE)
        found = self._match(records, asked)
        matched = len(found)
        found = {p: n for p, n in found.items() if _accepted(records[n], rules, chat)}
        if not matched:
            raise UserError(
                f"config.rollout.reuse: none of the {len(records)} responses in {self.path}"
                f" answers one of the {len(asked)} prompts of data.train: they were written for"
                " other prompts, after another prefix, or with another tokenizer or chat template."
                f" {_ADVICE.capitalize()}"
            )
        kept = self._kept(records, set(found.values()))
        if not self.text_alone:
            found = {p: n for p, n in found.items() if n in kept}
        logging.info(
            "data.train: %d responses from %s, %d to be written (%d are there but not accepted); of"
            " %d what the teacher predicted is there as well, and it need not read them",
            *(len(found), self.path, len(asked) - len(found), matched - len(found), len(kept)),
        )
        return {
            place: files.written_of(records[number], kept.get(number))
            for place, number in found.items()
        }

    def _match(self, records: Sequence[dict], asked: Sequence[Prompt]) -> dict[int, int]:
        """Place in `asked` -> place in `records`."""
        unused = collections.defaultdict(collections.deque)
        for number, record in enumerate(records):
            unused[record["prompt_digest"], record["number"]].append(number)
        found = {}
        for place, one in enumerate(asked):
            _, number, prompt_digest = one.key()
            numbers = unused[prompt_digest, number]
            if numbers:
                found[place] = numbers.popleft()
                self._check_ids(found[place], records[found[place]]["ids"])
        return found

    def _check_ids(self, number: int, ids: Sequence[int]) -> None:
        if max(ids, default=0) >= self.vocab_size:
            raise UserError(
                f"{self.path}:{number + 1} has the token id {max(ids)}, and the models have the"
                f" {self.vocab_size} ids below {self.vocab_size} in common; {_ADVICE}"
            )

    def _kept(self, records: Sequence[dict], wanted: set[int]) -> dict[int, TokenTopK]:
        """Place in `records` -> what this run's teacher predicted there, if the file has it."""
        found: dict[int, TokenTopK] = {}
        if self.top_k is None:
            return found
        bounds = [*files.kept_starts(self.path), len(records)]
        for start, end in itertools.pairwise(bounds):
            places = [n for n in range(start, end) if records[n]["kept"]]
            if not wanted.isdisjoint(places):
                lengths = [len(records[n]["ids"]) for n in places]
                kept = files.read_kept(self.path, start, lengths)
                found |= dict(zip(places, kept, strict=True))
        return {n: k for n, k in found.items() if n in wanted and self._serves(records[n], k)}

    def _serves(self, record: dict, kept: TokenTopK) -> bool:
        return (
            record["writer"] == self.teacher
            and kept.topk.ids.shape[-1] == self.top_k
            and kept.topk.temperature == self.temperature
            and bool((kept.topk.ids < self.vocab_size).all())
        )


def _accepted(record: dict, rules: RolloutFilter, chat: Chat) -> bool:
    completion = files.written_of(record)
    short = len(completion.ids) <= rules.max_new_tokens
    return short and rules.fate(completion, chat) is RowStatus.KEPT
