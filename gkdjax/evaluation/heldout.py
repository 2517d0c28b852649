"""The training loss on rows that are not trained."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from gkdjax import losses
from gkdjax.config import Config, Gkd
from gkdjax.data.dataset import DistillDataset
from gkdjax.data.load import Examples
from gkdjax.data.views import ViewRules
from gkdjax.evaluation import scoring
from gkdjax.evaluation import texts as evaluation_texts
from gkdjax.evaluation.scoring import EvalModel, ScoredText
from gkdjax.evaluation.texts import Texts, check_fits
from gkdjax.losses.objective import token_weights, weighted_divergence
from gkdjax.models.decoder import unembedding_table
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.parallel.mesh import head_axes
from gkdjax.teachers.base import Teacher
from gkdjax.teachers.local import LocalTeacher
from gkdjax.types import Example

_OF_THE_REST = {
    "bucket": "with the rest as one, KL is a lower bound and acceptance an upper one",
    "renormalize": "what is outside of them counts for nothing (gkd.tail = 'renormalize')",
}


class Validation:
    """The rows of data.validation, with the response that they bring or that the teacher wrote."""

    def __init__(self, feed: DistillDataset, config: Config, teacher: Teacher, mesh: Mesh):
        self._feed, self._config, self._teacher, self._mesh = feed, config, teacher, mesh

    def ask_teacher(self) -> None:
        """What it will say of them."""
        _ = self._scored

    def of_student(self, student: EvalModel) -> dict[str, float]:
        """{"loss": as in training, ...}, with the measures of `scoring.mean_agreement`."""
        gkd, total, weight = self._config.gkd, 0.0, 0.0
        for batch, targets in self._scored.batches:
            summed, weights = _loss(
                scoring.predicting(student, batch, "student", self._mesh),
                unembedding_table(student.decoder.spec, student.params),
                student.decoder.spec.final_softcap,
                targets,
                parallel_mesh.shard_rows(self._mesh, batch.target_mask_BN),
                gkd,
                self._mesh,
            )
            total, weight = total + float(summed), weight + float(weights)
        means = scoring.mean_agreement(student, self._scored, "student", gkd, self._mesh)
        return {"loss": total / weight, **means}

    @functools.cached_property
    def _scored(self) -> ScoredText:
        rows, chat = self._config.eval.batch_size, self._feed.rules.student_chat
        pairs = self._feed.first_pairs
        shapes = evaluation_texts.batch_shapes(pairs, rows, self._config.data.bucket_lengths)
        return evaluation_texts.score(pairs, shapes, self._teacher, rows, chat.pad_id, self._mesh)


@functools.partial(jax.jit, static_argnames=("softcap", "gkd", "mesh"))
def _loss(hidden_BND, table_VD, softcap, targets, mask_BN, gkd: Gkd, mesh: Mesh):
    """(sum of weighted divergences, of weights)."""
    weights_BN = token_weights(mask_BN, gkd.reduction)
    of = hidden_BND, table_VD, softcap, targets, weights_BN
    summed, _ = weighted_divergence(*of, gkd.divergence, **gkd.of_loss(), **head_axes(mesh))
    return summed, losses.masked_count(weights_BN)


class SideEffects:
    """The untrained student (p) against the trained one (q), on what the untrained one says.

    Both read unrelated prompts as they stand, without the prefix.
    """

    def __init__(self, untrained: LocalTeacher, config: Config, texts: Texts, mesh: Mesh):
        self._config, self._texts, self._mesh = config, texts, mesh
        for example in texts.examples:
            check_fits(example, len(texts.prompts(example)[0]), config.data.max_length)

    @classmethod
    def of(
        cls,
        untrained: LocalTeacher | None,
        config: Config,
        rules: ViewRules,
        examples: Sequence[Example],
        mesh: Mesh,
    ) -> "SideEffects | None":
        """None where there are no prompts, or the untrained student is not here.

        Args:
          untrained: the student as it was, with its whole vocabulary.
          config: of the run.
          rules: of the run's rows.
          examples: the prompts.
          mesh: of the run.
        """
        if untrained is None or not examples:
            return None
        chat = rules.student_chat
        rules = dataclasses.replace(rules, teacher_chat=chat, retained=0)
        return cls(untrained, config, Texts(config, rules, untrained, examples, mesh), mesh)

    def of_student(self, student: EvalModel, rows: int | None = None) -> dict[str, float]:
        """Measures by name, see `scoring.mean_agreement`.

        Args:
          student: trained so far.
          rows: on so many prompts, the first ones; None: on all.
        """
        text = self._texts.teacher_text
        if rows is not None:
            text = text.first(rows)
        return scoring.mean_agreement(student, text, "student", self._config.gkd, self._mesh)


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
    if not examples.retention:
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
