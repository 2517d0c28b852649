"""What a teacher is: its members, what it can do, and what a run may ask it beside."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from gkdjax.data.chat_template import Chat
from gkdjax.losses.objective import TeacherTargets, TopKTargets
from gkdjax.types import Batch, Completion, ContextLimit, Prompt, SamplingParams
from gkdjax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What the config is checked against, before the first step."""

    max_top_k: int | None  # largest K of its `TopKTargets`; None: up to the whole vocabulary
    dense: bool  # its targets can be exact over the whole vocabulary (`teacher.top_k=None`)
    samples: bool  # it can write responses (`Teacher.sample`)
    temperature: bool  # its probabilities can be taken at `gkd.temperature` other than 1
    scores: bool = True  # it can score text that others wrote, and not its own alone
    on_policy: bool = True  # also text that did not exist before the run, as the student's
    limits: str = ""  # why it does not score such text, for the user


@runtime_checkable
class Teacher(Protocol):
    """Anything with these members is a teacher; `gkdjax.run(..., teacher=...)` takes it.

    Attributes:
      capabilities: what it can do.
      chat: the tokenizer and chat template that render the teacher's view; None: the student's.
      description: a few words for errors and the files of its text. Text that is taken over from
        another run keeps its targets if the description is the same.
    """

    capabilities: Capabilities
    chat: Chat | None
    description: str

    def targets(self, batch: Batch) -> TeacherTargets:
        """Its predictions at `batch.teacher_at_BN`; what the mask leaves out is ignored."""
        ...

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: SamplingParams
    ) -> list[Completion]:
        """A response to each prompt (of the teacher's view); called if it `samples`.

        A response without a token is asked for again with another seed.
        """
        ...


@runtime_checkable
class RemoteTeacher(Teacher, Protocol):
    """A teacher that works elsewhere, while the device computes: batches are asked for ahead."""

    def ask(self, batch: Batch, names: Sequence[str]) -> Callable[[], TopKTargets]:
        """Begins what `targets` does -> a function that waits for it.

        Rows without a target cost nothing; `names` are those of all rows, for errors.
        """
        ...


class TeacherHooks:
    """What a run asks a teacher beside that; a teacher may inherit it, or not.

    Attributes:
      context: how much it reads.
      weights: in this process: a teacher with `decoder`, `params` and `prefixes`; None: none.
    """

    context = ContextLimit(None, "")
    weights = None

    def register(self, prompts_by_prefix: Sequence[Sequence[np.ndarray]]) -> None:
        """Token ids of the prompts of this run, by prefix: what several share is read once."""

    def stop_on(self, event: threading.Event) -> None:
        """Whoever waits for an answer gives up once the event is set."""

    def report(self) -> dict[str, int]:
        """Counts for results.json; every process asks for them."""
        return {}


def hooks(teacher: Teacher) -> TeacherHooks:
    """The teacher itself, or hooks that do nothing."""
    return teacher if isinstance(teacher, TeacherHooks) else TeacherHooks()


def require_teacher(teacher: object) -> None:
    """Raises UserError unless it has the members of a `Teacher`."""
    if not isinstance(teacher, Teacher):
        raise UserError(f"{teacher!r} is no teacher: see gkdjax.teachers.base.Teacher")


class Needs(NamedTuple):
    """What a run asks of its teacher beside the targets of its own text."""

    samples: bool  # responses
    scores: Sequence[str]  # texts of others that it has to read, for people; () if none
    on_policy: bool  # one of them is the student's


def refusals(
    can: Capabilities, *, top_k: int | None, temperature: float, tail: str, needs: Needs
) -> list[str]:
    """Why this teacher cannot serve the config, each with what would work; [] if it can.

    `top_k` is the config's `teacher.top_k`, `temperature` and `tail` are those of `gkd`.
    """
    found, limit = [], can.max_top_k
    if top_k is None and not can.dense:
        found.append(f"teacher.top_k=None asks for the whole vocabulary; set it to {limit} or less")
    if None not in (top_k, limit) and top_k > limit:
        found.append(f"teacher.top_k={top_k} is more than its limit of {limit}")
    retempered = top_k is not None and tail == "renormalize"  # exact from any temperature
    if temperature != 1.0 and not can.temperature and not retempered:
        found.append(
            f"gkd.temperature={temperature}: its probabilities are those of temperature 1; set"
            " gkd.temperature=1.0, or gkd.tail='renormalize' with a top_k"
        )
    if needs.samples and not can.samples:
        found.append(
            "it cannot write responses; give each row of data.train a 'response', and set"
            " eval.questions=None"
        )
    if needs.scores and not can.scores:
        found.append(
            f"it does not say what it predicts in text that it did not write ({can.limits}), and"
            f" that is wanted of {', '.join(needs.scores)}; let it write all of the text itself:"
            " rows without a response, gkd.on_policy_fraction=0, anchor.reference='base'"
        )
    elif needs.on_policy and not can.on_policy:
        found.append(
            "gkd.on_policy_fraction: it cannot read what the student writes during the run"
            f" ({can.limits}); set gkd.on_policy_fraction=0"
        )
    return found
