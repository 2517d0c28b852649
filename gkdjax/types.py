"""The dataclasses that rooms hand to each other: frozen, with the shape of each field.

Shape letters: B rows of a batch, N target numbers, S positions of the student's view, T positions
of the teacher's view, K top-k entries, E width of the teacher, V vocabulary.

Targets are indexed by number n, not by position: `student_at_BN[b, n]` is the position in the
student's view whose logits predict target n, and so for the teacher. The one-token shift between
a token's position and the position that predicts it is made in `data.views` and nowhere else.
"""

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

import jax
import numpy as np


def digest(content: bytes) -> str:
    """Returns 16 hexadecimal digits of SHA-256: millions of prompts must not share one."""
    return hashlib.sha256(content).hexdigest()[:16]


class Message(NamedTuple):
    """One message of a conversation; hashable, so rendered conversations can be cached."""

    role: str
    content: str
    fields: str = ""  # JSON object of other fields for the template, keys sorted; "": none
    learn: bool = True  # False: never a target, whatever its role ("weight": 0)

    def for_template(self) -> dict:
        """Returns role, content, and tool calls and the like by name."""
        fields = json.loads(self.fields) if self.fields else {}
        return {"role": self.role, "content": self.content, **fields}


class Prompt(NamedTuple):
    """A prompt whose completion is wanted."""

    name: str  # of the row
    ids: np.ndarray  # int32 [T], the writer's view up to where the response begins
    messages: tuple[Message, ...]  # what the teacher's view was rendered from
    tools: str = ""  # and the row's; see `Example`
    prefix: int = 0  # so many of the messages are the prefix
    number: int = 0  # of this completion among those of the row

    def key(self) -> tuple[str, int, str]:
        """Returns what finds its completion in a file: row, number, digest of the ids."""
        return self.name, self.number, digest(np.asarray(self.ids, np.int32).tobytes())


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Settings of a sampler."""

    max_new_tokens: int  # at least 1; a row that has not stopped by then is cut off
    temperature: float  # divides the logits; 0 takes the most probable token
    # Sample from the smallest set of tokens whose probability reaches it; 1: from all. Before that,
    # from the k most probable tokens; None, or as many as there are: from all. In both the lowest
    # ids come first among equals.
    top_p: float
    top_k: int | None = None


class Expected(NamedTuple):
    """The right answers to a question; see `gkdjax.data.answer_matching`."""

    match: str  # "keywords", "exact" or "regex"
    any_of: tuple[str, ...]  # any of them is right; at least one


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of data, before any model's tokenizer has seen it."""

    name: str  # its source, as "train.jsonl:17"; in every error about the row
    row_id: int  # its number in the data; random draws for the row depend on it
    prefix: tuple[Message, ...]  # what only the teacher reads; () if there is nothing
    turns: tuple[Message, ...]  # what both read, at least one message
    answer: Message | None  # the assistant's last message; None: a rollout provides it
    expected: Expected | None  # of a question for the evaluation, or None
    given: int = 0  # so many of the first turns are no targets, whatever their role
    tools: str = ""  # JSON list of the tools that the template describes; "": none

    @property
    def response(self) -> str | None:
        """The text of the answer."""
        return None if self.answer is None else self.answer.content


@dataclasses.dataclass(frozen=True)
class Completion:
    """A response as token ids, from the sampler to the loss."""

    ids: np.ndarray  # int32 [n]; if finished, the last one is a stop id
    finished: bool  # False: cut off at max_new_tokens, so there is no end-of-turn target
    # losses.topk.TokenTopK or TokenHidden: its row n predicted ids[n]; None: it was not asked for
    cached: Any = None
    refused: int = 0  # attempts that were not accepted
    author: str = ""  # "student", or the teacher's description


@dataclasses.dataclass(frozen=True)
class View:
    """The ids that one model reads, and the positions that predict the targets."""

    ids: np.ndarray  # int32 [T]
    at: np.ndarray  # int32 [N], position whose logits predict target n


@dataclasses.dataclass(frozen=True)
class ViewPair:
    """The teacher's and the student's view of one row; both predict the same targets."""

    name: str
    row_id: int
    student: View
    teacher: View
    target_ids: np.ndarray  # int32 [N], N >= 1
    cached: Any = None  # TokenTopK, the teacher's predictions when it wrote the targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Padded view pairs: all that a step and a teacher see of the data."""

    student_tokens_BS: jax.Array  # int32
    student_mask_BS: jax.Array  # bool, a real token
    student_at_BN: jax.Array  # int32, 0 where there is no target
    teacher_tokens_BT: jax.Array  # int32
    teacher_mask_BT: jax.Array  # bool
    teacher_at_BN: jax.Array  # int32, 0 where there is no target
    target_ids_BN: jax.Array  # int32, 0 where there is no target
    target_mask_BN: jax.Array  # bool, there is a target n in row b
    row_id_B: jax.Array  # int32


class ContextLimit(NamedTuple):
    """The context length of a model."""

    tokens: int | None  # None: unknown
    source: str  # what says so, for people
    written: int | None = None  # with what it writes itself: a server ends or refuses there


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes and a checkpoint holds of the model."""

    step: jax.Array  # int32 scalar, optimizer steps done
    trainable: Any  # adapters, or all parameters; float32
    opt_state: Any  # optax's
