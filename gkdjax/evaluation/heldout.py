"""Measures the training loss on rows that are not trained, and lists what cannot be measured."""

import functools

import jax
from jax.sharding import Mesh

from gkdjax import losses
from gkdjax.config import Config, Gkd
from gkdjax.data.load import Examples
from gkdjax.evaluation.scoring import EvalModel, ScoredText, predicting
from gkdjax.losses.objective import token_weights, weighted_divergence
from gkdjax.models.decoder import unembedding_table
from gkdjax.parallel.mesh import head_axes, shard_rows
from gkdjax.teachers.base import Teacher

_OF_THE_REST = {
    "bucket": "with the rest as one, KL is a lower bound and acceptance an upper one",
    "renormalize": "what is outside of them counts for nothing (gkd.tail = 'renormalize')",
}


def loss(student: EvalModel, scored: ScoredText, gkd: Gkd, mesh: Mesh) -> float:
    """Returns the loss of the student on texts, as in training."""
    total, weight = 0.0, 0.0
    for batch, targets in scored.batches:
        summed, weights = _loss(
            predicting(student, batch, "student", mesh),
            unembedding_table(student.decoder.spec, student.params),
            student.decoder.spec.final_softcap,
            targets,
            shard_rows(mesh, batch.target_mask_BN),
            gkd,
            mesh,
        )
        total, weight = total + float(summed), weight + float(weights)
    return total / weight


@functools.partial(jax.jit, static_argnames=("softcap", "gkd", "mesh"))
def _loss(hidden_BND, table_VD, softcap, targets, mask_BN, gkd: Gkd, mesh: Mesh):
    """(sum of weighted divergences, of weights)."""
    weights_BN = token_weights(mask_BN, gkd.reduction)
    of = hidden_BND, table_VD, softcap, targets, weights_BN
    summed, _ = weighted_divergence(*of, gkd.divergence, **gkd.of_loss(), **head_axes(mesh))
    return summed, losses.masked_count(weights_BN)


def unavailable(
    config: Config, teacher: Teacher, examples: Examples, baked: bool, validated: bool
) -> dict[str, str]:
    """Returns measure -> why it is missing, both in words.

    The run is `baked` if the teacher reads anything of the questions that the student does not, and
    `validated` if the loss of data.validation is measured.
    """
    found, can, top_k = {}, teacher.capabilities, config.teacher.top_k
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
    if examples.prompts and top_k is not None:
        rest = _OF_THE_REST[config.gkd.tail]
        found["exact divergences"] = f"the teacher gives its best {top_k} tokens: {rest}"
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
    elif not validated:
        found["validation loss"] = (
            "the teacher does not say what it predicts in text that it did not write"
            f" ({can.limits}), and rows of data.validation bring responses"
        )
    return found
