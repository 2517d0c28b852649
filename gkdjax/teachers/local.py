"""A teacher in this process: a decoder and its parameters, frozen."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from gkdjax.data.chat_template import Chat
from gkdjax.losses import fused_top_k
from gkdjax.losses.lm_head import unembed
from gkdjax.losses.objective import DenseTargets, TeacherTargets, TopKTargets
from gkdjax.models.decoder import Decoder, unembedding_table
from gkdjax.models.prefix_cache import PrefixCache
from gkdjax.models.sampler import Keep
from gkdjax.parallel.mesh import head_axes, shard_rows
from gkdjax.teachers.base import Capabilities, TeacherHooks
from gkdjax.types import Batch, Completion, ContextLimit, Prompt, SamplingParams
from gkdjax.utils.errors import UserError


class LocalTeacher(TeacherHooks):
    """Reads the teacher's view and returns hidden states (dense, exact) or its best K tokens."""

    capabilities = Capabilities(max_top_k=None, dense=True, samples=True, temperature=True)

    def __init__(
        self,
        decoder: Decoder,
        params: dict,
        chat: Chat,
        description: str,
        *,
        top_k: int | None,
        temperature: float,
        vocab_size: int,
        lengths: Sequence[int],
        batch_size: int,
        chunk_size: int,
        mesh: Mesh,
        prefix_bytes: int,
    ):
        """Keeps `params`, which lie on the mesh as the decoder's layout says, without a copy.

        Args:
          decoder, params, chat, description: the teacher's.
          top_k: None for `DenseTargets`, K for `TopKTargets`.
          temperature: of the logprobs in `TopKTargets`.
          vocab_size: of the student, whose checkpoint may pad the same vocabulary to another size;
            top-k entries come from the ids that both have, and where `chat.shared` says that the
            tokenizers differ, from all of the teacher's tokens: see `losses.within`.
          lengths, batch_size: padded prompt lengths and rows at once for sampling.
          chunk_size: of the head that finds the top k, see `losses.fused_top_k`.
          mesh: its devices share the rows.
          prefix_bytes: most of the keys and values of prefixes that are cached.
        """
        self.decoder, self.params, self.chat = decoder, params, chat
        self.description = description
        self._mesh, self._lengths, self._batch_size = mesh, tuple(lengths), batch_size
        rows = decoder.spec.vocab_size
        self._shared_vocab = vocab = min(vocab_size, rows)
        if chat is not None and chat.shared is not None:
            # The teacher's own tokens count, and no row that is no token.
            self._shared_vocab = min(vocab, chat.shared)
            known = max(chat.tokenizer.get_vocab().values()) + 1
            vocab = max(self._shared_vocab, min(rows, known))
        if chat is not None and self._shared_vocab < vocab_size:
            self.chat = dataclasses.replace(chat, shared=self._shared_vocab)
        self._keep = None if top_k is None else Keep(top_k, temperature, vocab)
        self._chunk_size = chunk_size
        self.prefixes = PrefixCache(decoder, params, prefix_bytes)
        where = "max_position_embeddings in config.json"
        self.context = ContextLimit(decoder.spec.context_length, where)

    @property
    def weights(self) -> "LocalTeacher":
        """See `base.TeacherHooks`."""
        return self

    def register(self, prompts_by_prefix: Sequence[Sequence[np.ndarray]]) -> None:
        """See `base.TeacherHooks`."""
        self.prefixes.register(prompts_by_prefix)

    def targets(self, batch: Batch) -> TeacherTargets:
        """See `base.Teacher`. Dispatched, not waited for."""
        hidden_BNE = self.prefixes.predicting_hidden(batch, self._mesh)
        spec = self.decoder.spec
        dense = DenseTargets(hidden_BNE, unembedding_table(spec, self.params), spec.final_softcap)
        if self._keep is None:
            return dense
        targets_BN = shard_rows(self._mesh, (batch.target_ids_BN, batch.target_mask_BN))
        return _top_k_targets(dense, *targets_BN, self._keep, self._chunk_size, self._mesh)

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: SamplingParams
    ) -> list[Completion]:
        """See `base.Teacher`; with a top k, the completions keep the targets."""
        return self.prefixes.sample(
            [prompt.ids for prompt in prompts],
            seeds,
            sampling,
            stop_ids=self.chat.stop_ids,
            batch_size=self._batch_size,
            lengths=self._lengths,
            mesh=self._mesh,
            keep=self._keep,
            vocab_size=self._shared_vocab,
        )


@functools.partial(jax.jit, static_argnames=("keep", "chunk_size", "mesh"))
def _top_k_targets(
    dense: DenseTargets, ids_BN, mask_BN, keep: Keep, chunk_size: int, mesh: Mesh
) -> TopKTargets:
    hidden_BNE, table_VE = dense.hidden_BNE, dense.unembedding_VE[: keep.vocab_size]
    how = {"temperature": keep.temperature, "softcap": dense.softcap, "chunk_size": chunk_size}
    topk = fused_top_k(hidden_BNE, table_VE, keep.top_k, mask_BN, **how, **head_axes(mesh))

    def logit(ids_BN):
        per_token = jax.vmap(jax.vmap(lambda h, row: unembed(h, row[None, :], dense.softcap)[0]))
        return per_token(hidden_BNE, table_VE[ids_BN]) / keep.temperature

    # The best token's logit and logprob are known, and with them the normaliser of each token.
    target_BN = topk.logprobs[:, :, 0] + logit(ids_BN) - logit(topk.ids[:, :, 0])
    return TopKTargets(topk, jnp.where(mask_BN, target_BN, 0.0))


def require_longer_view(views_differ: bool) -> None:
    """Raises UserError where teacher and student would read the same: the loss would be zero."""
    if not views_differ:
        raise UserError(
            "teacher.backend='local-toggle' is the student itself, and no row gives it more to read"
            " than the student: the loss would be zero. Give a prefix (context.prefix_messages),"
            " lower context.student_retained_turns, or take another teacher"
            " (teacher.backend='flax')"
        )


def announce_second_copy(num_bytes: int, reader: str) -> None:
    """Says the cost of a full fine-tuning whose untrained self is still needed."""
    logging.warning(
        "student.adapter='none' trains every parameter, so %s keeps a frozen second copy of the"
        " student: %.1f MiB",
        reader,
        num_bytes / 2**20,
    )
