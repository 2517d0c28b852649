"""Takes over responses of an earlier run: `rollout.reuse`."""

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Sequence

from absl import logging

from gkdjax.data.chat_template import Chat
from gkdjax.data.dataset import RolloutFilter
from gkdjax.data.views import RowStatus
from gkdjax.losses.topk import TokenTopK
from gkdjax.rollout import files
from gkdjax.types import Completion, Prompt
from gkdjax.utils.errors import UserError

_ADVICE = "mend it, or name another file in config.rollout.reuse"


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of responses, and which teacher's predictions on them this run can use."""

    path: pathlib.Path  # a RUN/trajectories_*.jsonl
    teacher: str  # the description of this run's teacher
    top_k: int | None  # the K of its predictions; None: it gives no top k
    temperature: float  # of its predictions
    vocab_size: int  # ids that both models have
    text_alone: bool  # text without predictions will do: the teacher can score it

    def responses(
        self, prompts: Sequence[Prompt], rules: RolloutFilter, chat: Chat
    ) -> dict[int, Completion]:
        """Returns place in `prompts` -> a response in the file to the same prompt and number.

        Equal prompts take one each, in the order of the file. A response that `rules` would not
        accept from the teacher, whose chat it is, is left for the teacher to write.

        Raises:
          UserError: the file is missing or damaged, fits no row, or has ids that no model has.
        """
        if not self.path.is_file():
            raise UserError(f"config.rollout.reuse: there is no file {self.path}")
        records = files.read(self.path, _ADVICE)
        matched = self._match(records, prompts)
        if not matched:
            raise UserError(
                f"config.rollout.reuse: none of the {len(records)} responses in {self.path}"
                f" answers one of the {len(prompts)} prompts of data.train: they were written for"
                " other prompts, after another prefix, or with another tokenizer or chat template."
                f" {_ADVICE.capitalize()}"
            )
        found = {
            place: number
            for place, number in matched.items()
            if len(records[number]["ids"]) <= rules.max_new_tokens
            and rules.status(files.completion_of(records[number]), chat) is RowStatus.KEPT
        }
        cached = self._cached(records, set(found.values()))
        if not self.text_alone:
            found = {place: number for place, number in found.items() if number in cached}
        logging.info(
            "data.train: %d responses from %s, %d to be written (%d are there but not accepted); of"
            " %d what the teacher predicted is there as well, and it need not read them",
            *(len(found), self.path, len(prompts) - len(found), len(matched) - len(found)),
            len(cached),
        )
        return {
            place: files.completion_of(records[number], cached.get(number))
            for place, number in found.items()
        }

    def _match(self, records: Sequence[dict], prompts: Sequence[Prompt]) -> dict[int, int]:
        """Place in `prompts` -> place in `records`."""
        unused = collections.defaultdict(collections.deque)
        for number, record in enumerate(records):
            unused[record["prompt_digest"], record["number"]].append(number)
        found = {}
        for place, prompt in enumerate(prompts):
            _, number, prompt_digest = prompt.key()
            numbers = unused[prompt_digest, number]
            if numbers:
                found[place] = number = numbers.popleft()
                largest = max(records[number]["ids"], default=0)
                if largest >= self.vocab_size:
                    raise UserError(
                        f"{self.path}:{number + 1} has the token id {largest}, and the models have"
                        f" the {self.vocab_size} ids below {self.vocab_size} in common; {_ADVICE}"
                    )
        return found

    def _cached(self, records: Sequence[dict], wanted: set[int]) -> dict[int, TokenTopK]:
        """Place in `records` -> the top k that this run's teacher would give, if it is there."""
        found: dict[int, TokenTopK] = {}
        if self.top_k is None:
            return found
        bounds = [*files.cached_starts(self.path), len(records)]
        for start, end in itertools.pairwise(bounds):
            places = [n for n in range(start, end) if records[n]["kept"]]
            if wanted.isdisjoint(places):
                continue
            lengths = [len(records[n]["ids"]) for n in places]
            for n, cached in zip(places, files.read_cached(self.path, start, lengths), strict=True):
                if (
                    n in wanted
                    and records[n]["writer"] == self.teacher
                    and cached.topk.ids.shape[-1] == self.top_k
                    and cached.topk.temperature == self.temperature
                    and bool((cached.topk.ids < self.vocab_size).all())
                ):
                    found[n] = cached
        return found
