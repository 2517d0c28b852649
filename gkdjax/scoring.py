"""How near a model is to the teacher on given texts, chunk by chunk, over the run's devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gkdjax import losses, sharding
from gkdjax.config import Gkd
from gkdjax.data.chat import Chat
from gkdjax.losses.chunks import Chunks, over_chunks
from gkdjax.losses.head import Head
from gkdjax.models.decoder import Decoder, unembedding_table
from gkdjax.prefix_store import PrefixStore, predicting_hidden
from gkdjax.types import Batch, DenseTargets, TeacherTargets

_ARRAYS = 8  # [tokens, V] held at once with dense targets, counted as in `losses.fused`
_MASS_TOP_K = 64  # of the two masses, where teacher.top_k does not say


@dataclasses.dataclass(frozen=True)
class Reader:
    """A model that answers: the untrained student, or the trained one."""

    decoder: Decoder
    params: dict
    chat: Chat
    prefixes: PrefixStore  # of this model

    @classmethod
    def of(cls, decoder: Decoder, params: dict, chat: Chat, prefix_bytes: int) -> "Reader":
        """With a store of its own; see `PrefixStore`."""
        return cls(decoder, params, chat, PrefixStore(decoder, params, prefix_bytes))


@dataclasses.dataclass(frozen=True)
class Scored:
    """Texts and what the teacher says of them; some rows of the last batch count for nothing."""

    batches: list[tuple[Batch, TeacherTargets]]
    rows: int  # of a batch

    def first(self, rows: int) -> "Scored":
        """The batches that hold the first `rows` texts, and those texts alone."""
        kept = []
        for start, (batch, targets) in zip(range(0, rows, self.rows), self.batches, strict=False):
            wanted_B1 = np.arange(self.rows)[:, None] < rows - start
            mask = batch.target_mask_BN & wanted_B1
            kept.append((dataclasses.replace(batch, target_mask_BN=mask), targets))
        return Scored(kept, self.rows)


def mean_agreement(
    reader: Reader, scored: Scored, view: str, gkd: Gkd, mesh: Mesh
) -> losses.Agreement:
    """Means over all target tokens, as Python floats, at `gkd.temperature`.

    Args:
      view: "student" or "teacher": what of each text's prompt the reader sees.
    """
    total, count = np.zeros(len(losses.Agreement._fields)), 0.0
    for batch, targets in scored.batches:
        hidden_BND = _hidden(reader, batch, view, mesh)
        sums, tokens = _agreement_sums(
            hidden_BND,
            unembedding_table(reader.decoder.spec, reader.params),
            reader.decoder.spec.final_softcap,
            targets,
            sharding.shard_rows(mesh, batch.target_mask_BN),
            gkd,
            mesh,
        )
        total, count = total + np.asarray(sums, np.float64), count + float(tokens)
    return losses.Agreement(*(total / count).tolist())


def _hidden(reader: Reader, batch: Batch, view: str, mesh: Mesh):
    """[B,N,D] at the positions that predict the targets."""
    if view == "teacher":
        return reader.prefixes.predicting_hidden(batch, mesh)
    read = batch.student_tokens_BS, batch.student_mask_BS, batch.student_at_BN
    return predicting_hidden(reader.decoder, reader.params, *sharding.shard_rows(mesh, read))


@functools.partial(jax.jit, static_argnames=("softcap", "gkd", "mesh"))
def _agreement_sums(hidden_BND, unembedding_VD, softcap, targets, mask_BN, gkd: Gkd, mesh: Mesh):
    found = fused_agreement(hidden_BND, unembedding_VD, softcap, targets, mask_BN, gkd, mesh)
    sums = [losses.masked_sum(each_BN, mask_BN) for each_BN in found]
    return jnp.stack(sums), losses.masked_count(mask_BN)


def fused_agreement(
    hidden_BND, unembedding_VD, softcap, targets: TeacherTargets, mask_BN, gkd: Gkd, mesh: Mesh
) -> losses.Agreement:
    """`losses.Agreement` of [B,N] arrays, chunk by chunk; 0 where the mask is False."""
    student, temperature = Head(softcap, 1.0), gkd.temperature
    if isinstance(targets, DenseTargets):
        shared = min(unembedding_VD.shape[0], targets.unembedding_VE.shape[0])
        tables = unembedding_VD[:shared], targets.unembedding_VE[:shared]
        teacher, k = Head(targets.softcap, 1.0), min(_MASS_TOP_K, shared)

        def compare(hidden, other, tables):
            sides = student.logits(hidden, tables[0]), teacher.logits(other, tables[1])
            return losses.dense_agreement(*sides, k, temperature=temperature)

        per_token = targets.hidden_BNE
    else:

        def compare(hidden, topk, table):
            logits = student.logits(hidden, table)
            return losses.topk_agreement(logits, topk, tail=gkd.tail, temperature=temperature)

        per_token, tables = targets.topk, unembedding_VD
    _, found = over_chunks(
        lambda nothing, chunk, tables: (nothing, compare(*chunk, tables)),
        (),
        (hidden_BND, per_token),
        tables,
        mask_BN,
        Chunks.of_memory(gkd.chunk_size, _ARRAYS, mesh),
    )
    return found
