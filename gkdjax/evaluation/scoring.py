"""Measures how near a model is to the teacher on given texts, in chunks, over the run's devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gkdjax import losses
from gkdjax.config import Gkd
from gkdjax.data.chat_template import Chat
from gkdjax.losses.chunks import Chunks, over_chunks
from gkdjax.losses.lm_head import Head
from gkdjax.losses.objective import (
    DenseTargets,
    TeacherTargets,
    shared_ids,
    token_weights,
    weighted_divergence,
)
from gkdjax.models.decoder import Decoder, unembedding_table
from gkdjax.models.prefix_cache import PrefixCache, predicting_hidden
from gkdjax.parallel.mesh import fetch, head_axes, shard_rows
from gkdjax.types import Batch

_ARRAYS = 8  # [tokens, V] held at once with dense targets, counted as in `losses.fused`
_MASS_TOP_K = 64  # of the two masses, where teacher.top_k does not say


@dataclasses.dataclass(frozen=True)
class EvalModel:
    """A model that answers: the untrained student, or the trained one."""

    decoder: Decoder
    params: dict
    chat: Chat
    prefixes: PrefixCache  # of this model

    @classmethod
    def of(cls, decoder: Decoder, params: dict, chat: Chat, prefix_bytes: int) -> "EvalModel":
        return cls(decoder, params, chat, PrefixCache(decoder, params, prefix_bytes))


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """Texts with a teacher's targets; rows that fill up the last batch have no target."""

    batches: list[tuple[Batch, TeacherTargets]]
    rows: int  # of a batch

    def first(self, rows: int) -> "ScoredText":
        """Returns the first `rows` texts."""
        kept = []
        for start, (batch, targets) in zip(range(0, rows, self.rows), self.batches, strict=False):
            wanted_B1 = np.arange(self.rows)[:, None] < rows - start
            mask_BN = batch.target_mask_BN & wanted_B1
            kept.append((dataclasses.replace(batch, target_mask_BN=mask_BN), targets))
        return ScoredText(kept, self.rows)


def mean_agreement(
    model: EvalModel, scored: ScoredText, view: str, gkd: Gkd, mesh: Mesh
) -> dict[str, float]:
    """Returns means over all targets: the fields of `losses.Agreement`, and "perplexity".

    The divergences are those of the teacher's p and the model's q at `gkd.temperature`. The
    perplexity, exp(-mean log q(token)), is the model's own, at temperature 1. `view` is "student"
    or "teacher": which prompt of each text the model reads.
    """
    names = (*losses.Agreement._fields, "perplexity")
    total, count = np.zeros(len(names)), 0.0
    table_VD = unembedding_table(model.decoder.spec, model.params)
    for batch, targets in scored.batches:
        sums, tokens = _sums(
            predicting(model, batch, view, mesh),
            table_VD,
            model.decoder.spec.final_softcap,
            targets,
            *shard_rows(mesh, (batch.target_ids_BN, batch.target_mask_BN)),
            gkd,
            mesh,
        )
        total += np.asarray(fetch(sums), np.float64)
        count += float(tokens)
    means = dict(zip(names, (total / count).tolist(), strict=True))
    return means | {"perplexity": math.exp(means["perplexity"])}


def predicting(model: EvalModel, batch: Batch, view: str, mesh: Mesh) -> jax.Array:
    """Returns hidden states [B,N,D] at the positions that predict the targets."""
    if view == "teacher":
        return model.prefixes.predicting_hidden(batch, mesh)
    read = batch.student_tokens_BS, batch.student_mask_BS, batch.student_at_BN
    return predicting_hidden(model.decoder, model.params, *shard_rows(mesh, read))


def own_perplexity(scored: ScoredText) -> dict[str, float]:
    """Returns the teacher's "perplexity", exp(-mean log p(token)); {} of dense targets."""
    total, count = 0.0, 0
    for batch, targets in scored.batches:
        if isinstance(targets, DenseTargets):
            return {}
        logprob_BN = np.asarray(fetch(targets.target_logprob_BN), np.float64)
        total += logprob_BN[batch.target_mask_BN].sum()
        count += int(batch.target_mask_BN.sum())
    return {"perplexity": math.exp(-total / count)}


@functools.partial(jax.jit, static_argnames=("softcap", "gkd", "mesh"))
def _sums(hidden_BND, table_VD, softcap, targets, ids_BN, mask_BN, gkd: Gkd, mesh: Mesh):
    """(sums of the measures and of -log q(ids) over the mask, number of tokens)."""
    chunks = Chunks.of_memory(gkd.chunk_size, _ARRAYS, **head_axes(mesh))
    student, join = Head(softcap, 1.0), chunks.vocabulary.join  # each device gets all logits
    if isinstance(targets, DenseTargets):
        shared = shared_ids(table_VD, targets)
        tables = table_VD[:shared], targets.unembedding_VE[:shared]
        teacher, k = Head(targets.softcap, 1.0), min(_MASS_TOP_K, shared)
        per_token = targets.hidden_BNE
    else:
        tables = table_VD[: targets.shared], None
        per_token = losses.within(targets.topk, targets.shared)

    def compare(_, chunk, tables):
        hidden_CD, of_teacher, ids_C = chunk
        logits_CV = join(student.logits(hidden_CD, tables[0]))
        if isinstance(targets, DenseTargets):
            others_CV = join(teacher.logits(of_teacher, tables[1]))
            agreement = losses.dense_agreement(logits_CV, others_CV, k, temperature=gkd.temperature)
        else:
            agreement = losses.topk_agreement(
                logits_CV, of_teacher, tail=gkd.tail, temperature=gkd.temperature
            )
        logits_CV = logits_CV.astype(jnp.float32)
        of_id_C = jnp.take_along_axis(logits_CV, ids_C[:, None], axis=-1)[:, 0]
        return (), (*agreement, jax.nn.logsumexp(logits_CV, axis=-1) - of_id_C)

    inputs = hidden_BND, per_token, ids_BN
    _, found = over_chunks(compare, (), inputs, tables, mask_BN, chunks)
    sums = jnp.stack([losses.masked_sum(each_BN, mask_BN) for each_BN in found])
    return sums, losses.masked_count(mask_BN)


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
