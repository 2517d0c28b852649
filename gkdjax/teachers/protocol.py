"""What a teacher has to be able to do, and to say of itself."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from gkdjax.data.chat import Chat
from gkdjax.sampler import Sampling
from gkdjax.types import Batch, TeacherTargets, Trajectory


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What the config is checked against, before the first step.

    Attributes:
      max_top_k: largest K of its `TopKTargets`; None: up to the whole vocabulary.
      dense: its targets can be exact over the whole vocabulary (`teacher.top_k=None`).
      samples: it can write responses (`Teacher.sample`).
      temperature: its probabilities can be taken at `gkd.temperature` other than 1.
    """

    max_top_k: int | None
    dense: bool
    samples: bool
    temperature: bool


@runtime_checkable
class Teacher(Protocol):
    """Anything with these three members is a teacher; `loop.run(..., teacher=...)` takes it.

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
        self, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampling: Sampling
    ) -> list[Trajectory]:
        """A response to each prompt (token ids of the teacher's view); called if it `samples`."""
        ...


def refusals(
    capabilities: Capabilities, *, top_k: int | None, temperature: float, tail: str, samples: bool
) -> list[str]:
    """Why this teacher cannot serve the config, each with what would work; [] if it can.

    Args:
      capabilities: the teacher's.
      top_k: `teacher.top_k`.
      temperature: `gkd.temperature`.
      tail: `gkd.tail`.
      samples: the run needs responses written by the teacher.
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
    if samples and not capabilities.samples:
        found.append(
            "it cannot write responses; give each row of data.train a 'response', and set"
            " eval.questions=None"
        )
    return found
