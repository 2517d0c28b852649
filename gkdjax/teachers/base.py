"""What a teacher has to be able to do, and to say of itself."""

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
    """What the config is checked against, before the first step.

    Attributes:
      max_top_k: largest K of its `TopKTargets`; None: up to the whole vocabulary.
      dense: its targets can be exact over the whole vocabulary (`teacher.top_k=None`).
      samples: it can write responses (`Teacher.sample`).
      temperature: its probabilities can be taken at `gkd.temperature` other than 1.
      scores: it says what it predicts in text that others wrote, and not in its own alone.
      on_policy: also in text that did not exist before the run, as the student's.
      limits: why it does not score or know such text, for the user.
    """

    max_top_k: int | None
    dense: bool
    samples: bool
    temperature: bool
    scores: bool = True
    on_policy: bool = True
    limits: str = ""


@runtime_checkable
class Teacher(Protocol):
    """Anything with these three members is a teacher; `train.run.run(..., teacher=...)` takes it.

    Attributes:
      capabilities: what it can do.
      chat: the tokenizer and chat template that render the teacher's view; None: the student's.
      description: a few words for errors and the files of its text; where text is taken over from
        another run, what was kept of it counts as this teacher's if the description is the same.
    """

    capabilities: Capabilities
    chat: Chat | None
    description: str

    def targets(self, batch: Batch) -> TeacherTargets:
        """What it predicts at `batch.teacher_at_BN`; what the mask leaves out is ignored."""
        ...

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: SamplingParams
    ) -> list[Completion]:
        """A response to each prompt (of the teacher's view); called if it `samples`.

        One without a token is refused: it is asked for again with another seed.
        """
        ...


@runtime_checkable
class RemoteTeacher(Teacher, Protocol):
    """One that works elsewhere, while the device computes: batches are asked for ahead."""

    def ask(self, batch: Batch, names: Sequence[str]) -> Callable[[], TopKTargets]:
        """Begins what `targets` does -> a function that waits for it.

        Rows without a target cost nothing; `names` are those of all rows, for errors.
        """
        ...


class TeacherHooks:
    """What a run asks and tells a teacher beside that; one of your own may inherit it, or not.

    Attributes:
      context: how much it reads.
      weights: of this process: a teacher with `decoder`, `params` and `prefixes`; None: none.
    """

    context: ContextLimit = ContextLimit(None, "")
    weights = None

    def register(self, prompts_by_prefix: Sequence[Sequence[np.ndarray]]) -> None:
        """Token ids of the prompts of this run, by prefix: what several share is read once."""

    def stop_on(self, event: threading.Event) -> None:
        """Whoever waits for an answer looks at it, and gives up once it is set."""

    def report(self) -> dict[str, int]:
        """Counts for results.json; every process asks for them."""
        return {}


def hooks(teacher: Teacher) -> TeacherHooks:
    """The teacher itself, or what does nothing where it has no hooks."""
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
    capabilities: Capabilities, *, top_k: int | None, temperature: float, tail: str, needs: Needs
) -> list[str]:
    """Why this teacher cannot serve the config, each with what would work; [] if it can.

    Args:
      capabilities: the teacher's.
      top_k: `teacher.top_k`.
      temperature: `gkd.temperature`.
      tail: `gkd.tail`.
      needs: of the run.
    """
    found = []
    if top_k is None and not capabilities.dense:
        limit = capabilities.max_top_k
        found.append(f"teacher.top_k=None asks for the whole vocabulary; set it to {limit} or less")
    if top_k is not None and capabilities.max_top_k is not None and top_k > capabilities.max_top_k:
        found.append(f"teacher.top_k={top_k} is more than its limit of {capabilities.max_top_k}")
    retempered = top_k is not None and tail == "renormalize"  # exact from any temperature
    if temperature != 1.0 and not capabilities.temperature and not retempered:
        found.append(
            f"gkd.temperature={temperature}: its probabilities are those of temperature 1; set"
            " gkd.temperature=1.0, or gkd.tail='renormalize' with a top_k"
        )
    if needs.samples and not capabilities.samples:
        found.append(
            "it cannot write responses; give each row of data.train a 'response', and set"
            " eval.questions=None"
        )
    if needs.scores and not capabilities.scores:
        found.append(
            "it does not say what it predicts in text that it did not write"
            f" ({capabilities.limits}), and that is wanted of {', '.join(needs.scores)}; let it"
            " write all of the text itself: rows without a response, gkd.on_policy_fraction=0,"
            " anchor.reference='base'"
        )
    elif needs.on_policy and not capabilities.on_policy:
        found.append(
            f"gkd.on_policy_fraction: it cannot read what the student writes during the run"
            f" ({capabilities.limits}); set gkd.on_policy_fraction=0"
        )
    return found
