"""Which measures a run does not have, why, and what would bring them."""

from gkdjax.config import Config
from gkdjax.evaluation.validation import Validation
from gkdjax.examples_of_run import Examples
from gkdjax.teachers.protocol import Teacher

_OF_THE_REST = {
    "bucket": "with the rest as one, KL is a lower bound and acceptance an upper one",
    "renormalize": "what is outside of them counts for nothing (gkd.tail = 'renormalize')",
}


def unavailable(
    config: Config,
    teacher: Teacher,
    examples: Examples,
    baked: bool,
    validation: Validation | None,
) -> dict[str, str]:
    """Measure -> why it is not there, both in words.

    Args:
      config: of the run.
      teacher: of the run.
      examples: what is asked.
      baked: whether the teacher reads anything of the questions that the student does not.
      validation: None where it is not measured.
    """
    found, can = {}, teacher.capabilities
    if not examples.questions:
        found["accuracy and recovery"] = "no questions with answers: set eval.questions"
    if not examples.heldout:
        found["accuracy on held-out questions"] = "none are there: set eval.heldout"
    if not examples.prompts:
        found["distance to the prompted teacher"] = (
            "no prompts to measure it on: set eval.questions or eval.prompts"
        )
    elif not can.on_policy:
        found["distance on the student's own text"] = f"the teacher cannot read it ({can.limits})"
    if examples.prompts and config.teacher.top_k is not None:
        found["exact divergences"] = (
            f"the teacher gives its best {config.teacher.top_k} tokens: "
            + _OF_THE_REST[config.gkd.tail]
        )
    if not baked:
        found["student with the prefix, and what the prefix costs"] = (
            "the teacher reads nothing that the student does not: there is no prefix to leave out"
        )
    if not config.eval.other_prefix:
        found["student with another prefix"] = "none was given: set eval.other_prefix"
    if not examples.abilities:
        found["kept abilities"] = "no questions beside the task: set eval.retention"
    if not examples.side_effects:
        found["side effects"] = (
            "no unrelated prompts: set eval.side_effects, or eval.retention, whose prompts serve"
        )
    if not examples.validation:
        found["validation loss"] = "no rows for it: set data.validation"
    elif validation is None:
        found["validation loss"] = (
            f"the teacher does not say what it predicts in text that it did not write"
            f" ({can.limits}), and rows of data.validation bring responses"
        )
    return found
