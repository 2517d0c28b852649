"""How near a model is to the teacher on given texts, chunk by chunk, over the run's devices."""

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
from gkdjax.losses.objective import DenseTargets, TeacherTargets, shared_ids
from gkdjax.models.decoder import Decoder, unembedding_table
from gkdjax.models.prefix_cache import PrefixCache, predicting_hidden
from gkdjax.parallel import mesh as parallel_mesh
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
        """With a store of its own; see `PrefixCache`."""
        return cls(decoder, params, chat, PrefixCache(decoder, params, prefix_bytes))


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """Texts and what the teacher says of them; some rows of the last batch count for nothing."""

    batches: list[tuple[Batch, TeacherTargets]]
    rows: int  # of a batch

    def first(self, rows: int) -> "ScoredText":
        """The batches that hold the first `rows` texts, and those texts alone."""
        kept = []
        for start, (batch, targets) in zip(range(0, rows, self.rows), self.batches, strict=False):
            wanted_B1 = np.arange(self.rows)[:, None] < rows - start
            mask = batch.target_mask_BN & wanted_B1
            kept.append((dataclasses.replace(batch, target_mask_BN=mask), targets))
        return ScoredText(kept, self.rows)


def mean_agreement(
    reader: EvalModel, scored: ScoredText, view: str, gkd: Gkd, mesh: Mesh
) -> dict[str, float]:
    """Means over all target tokens: those of `losses.Agreement` by name, and "perplexity".

    The divergences are taken at `gkd.temperature`. The perplexity, exp(-mean log q(token)), is the
    reader's own of the text, at temperature 1, whatever the teacher says.

    Args:
      reader: q.
      scored: the text and the teacher, p.
      view: "student" or "teacher": what of each text's prompt the reader sees.
      gkd: of the config.
      mesh: of the run.
    """
    names = (*losses.Agreement._fields, "perplexity")
    total, count = np.zeros(len(names)), 0.0
    for batch, targets in scored.batches:
        sums, tokens = _sums(
            predicting(reader, batch, view, mesh),
            unembedding_table(reader.decoder.spec, reader.params),
            reader.decoder.spec.final_softcap,
            targets,
            *parallel_mesh.shard_rows(mesh, (batch.target_ids_BN, batch.target_mask_BN)),
            gkd,
            mesh,
        )
        total, count = (
            total + np.asarray(parallel_mesh.fetch(sums), np.float64),
            count + float(tokens),
        )
    means = dict(zip(names, (total / count).tolist(), strict=True))
    return means | {"perplexity": math.exp(means["perplexity"])}


def predicting(reader: EvalModel, batch: Batch, view: str, mesh: Mesh):
    """[B,N,D] at the positions that predict the targets."""
    if view == "teacher":
        return reader.prefixes.predicting_hidden(batch, mesh)
    read = batch.student_tokens_BS, batch.student_mask_BS, batch.student_at_BN
    return predicting_hidden(reader.decoder, reader.params, *parallel_mesh.shard_rows(mesh, read))


def own_perplexity(scored: ScoredText) -> dict[str, float]:
    """The teacher's, exp(-mean log p(token)), by name; {} where it said it of no token alone."""
    total, count = 0.0, 0
    for batch, targets in scored.batches:
        if isinstance(targets, DenseTargets):
            return {}
        logprob_BN = np.asarray(parallel_mesh.fetch(targets.target_logprob_BN), np.float64)
        total += logprob_BN[batch.target_mask_BN].sum()
        count += int(batch.target_mask_BN.sum())
    return {"perplexity": math.exp(-total / count)}


@functools.partial(jax.jit, static_argnames=("softcap", "gkd", "mesh"))
def _sums(hidden_BND, table_VD, softcap, targets, ids_BN, mask_BN, gkd: Gkd, mesh: Mesh):
    """(of each measure, over the tokens of the mask; their number); the last one is -log q."""
    found = fused_agreement(hidden_BND, table_VD, softcap, targets, ids_BN, mask_BN, gkd, mesh)
    agreement, surprise_BN = found
    sums = [losses.masked_sum(each_BN, mask_BN) for each_BN in (*agreement, surprise_BN)]
    return jnp.stack(sums), losses.masked_count(mask_BN)


def fused_agreement(
    hidden_BND,
    unembedding_VD,
    softcap,
    targets: TeacherTargets,
    ids_BN,
    mask_BN,
    gkd: Gkd,
    mesh: Mesh,
) -> tuple[losses.Agreement, jax.Array]:
    """`losses.Agreement` and -log q(ids) of [B,N] arrays, chunk by chunk; 0 outside the mask."""
    student, temperature = Head(softcap, 1.0), gkd.temperature
    chunks = Chunks.of_memory(gkd.chunk_size, _ARRAYS, **parallel_mesh.head_axes(mesh))
    join = chunks.vocabulary.join  # of a chunk's tokens each device then has all logits
    if isinstance(targets, DenseTargets):
        shared = shared_ids(unembedding_VD, targets)
        tables = unembedding_VD[:shared], targets.unembedding_VE[:shared]
        teacher, k = Head(targets.softcap, 1.0), min(_MASS_TOP_K, shared)

        def compare(hidden, other, ids, tables):
            logits = join(student.logits(hidden, tables[0]))
            agreement = losses.dense_agreement(
                logits, join(teacher.logits(other, tables[1])), k, temperature=temperature
            )
            return agreement, _surprise(logits, ids)

        per_token = targets.hidden_BNE
    else:

        def compare(hidden, topk, ids, table):
            logits = join(student.logits(hidden, table))
            agreement = losses.topk_agreement(logits, topk, tail=gkd.tail, temperature=temperature)
            return agreement, _surprise(logits, ids)

        per_token = losses.within(targets.topk, targets.shared)
        tables = unembedding_VD[: targets.shared]
    _, found = over_chunks(
        lambda nothing, chunk, tables: (nothing, compare(*chunk, tables)),
        (),
        (hidden_BND, per_token, ids_BN),
        tables,
        mask_BN,
        chunks,
    )
    return found


def _surprise(logits_CV: jax.Array, ids_C: jax.Array) -> jax.Array:
    """-log q of each token's id, at temperature 1."""
    logits_CV = logits_CV.astype(jnp.float32)
    of_id_C = jnp.take_along_axis(logits_CV, ids_C[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits_CV, axis=-1) - of_id_C
