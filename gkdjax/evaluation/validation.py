"""The training loss on rows that are not trained."""

import functools

import jax
from jax.sharding import Mesh

from gkdjax import losses, sharding
from gkdjax.config import Config, Gkd
from gkdjax.evaluation import scoring, texts
from gkdjax.evaluation.scoring import Reader, Scored
from gkdjax.feed import Feed
from gkdjax.models.decoder import unembedding_table
from gkdjax.teachers.protocol import Teacher
from gkdjax.train_step import token_weights, weighted_divergence


class Validation:
    """The rows of data.validation, with the response that they bring or that the teacher wrote."""

    def __init__(self, feed: Feed, config: Config, teacher: Teacher, mesh: Mesh):
        self._feed, self._config, self._teacher, self._mesh = feed, config, teacher, mesh

    def ask_teacher(self) -> None:
        """What it will say of them."""
        _ = self._scored

    def of_student(self, student: Reader) -> dict[str, float]:
        """{"loss": as in training, ...}, with the measures of `scoring.mean_agreement`."""
        gkd, total, weight = self._config.gkd, 0.0, 0.0
        for batch, targets in self._scored.batches:
            summed, weights = _loss(
                scoring.predicting(student, batch, "student", self._mesh),
                unembedding_table(student.decoder.spec, student.params),
                student.decoder.spec.final_softcap,
                targets,
                sharding.shard_rows(self._mesh, batch.target_mask_BN),
                gkd,
                self._mesh,
            )
            total, weight = total + float(summed), weight + float(weights)
        means = scoring.mean_agreement(student, self._scored, "student", gkd, self._mesh)
        return {"loss": total / weight, **means}

    @functools.cached_property
    def _scored(self) -> Scored:
        rows, chat = self._config.eval.batch_size, self._feed.rules.student_chat
        pairs = self._feed.first_pairs
        shapes = texts.batch_shapes(pairs, rows, self._config.data.bucket_lengths)
        return texts.score(pairs, shapes, self._teacher, rows, chat.pad_id, self._mesh)


@functools.partial(jax.jit, static_argnames=("softcap", "gkd", "mesh"))
def _loss(hidden_BND, table_VD, softcap, targets, mask_BN, gkd: Gkd, mesh: Mesh):
    """(sum of weighted divergences, of weights)."""
    weights_BN = token_weights(mask_BN, gkd.reduction)
    of = hidden_BND, table_VD, softcap, targets, weights_BN
    summed, _ = weighted_divergence(*of, gkd.divergence, gkd, mesh)
    return summed, losses.masked_count(weights_BN)
