"""A teacher in this process: a decoder and its parameters, frozen."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gkdjax import sharding
from gkdjax.data.chat import Chat
from gkdjax.losses import top_k_logprobs
from gkdjax.models.decoder import Decoder, unembed
from gkdjax.sampler import Sampling, sample
from gkdjax.teachers.protocol import Capabilities
from gkdjax.types import Batch, DenseTargets, TeacherTargets, TopKTargets, Trajectory


class FlaxTeacher:
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
        mesh: Mesh,
    ):
        """Keeps `params`, without a copy.

        Args:
          decoder: the teacher's.
          params: replicated over the mesh.
          chat: renders the teacher's view.
          description: a few words for the log.
          top_k: None for `DenseTargets`, K for `TopKTargets`.
          vocab_size: of the student, whose checkpoint may pad the same vocabulary to another size;
            top-k entries come from the ids that both have.
          temperature: at which the logprobs of `TopKTargets` are taken.
          lengths: padded prompt lengths for sampling.
          batch_size: rows sampled at once.
          mesh: the rows of a batch are cut along its data axis.
        """
        self.decoder, self.params, self.chat = decoder, params, chat
        self.description = description
        self._top_k, self._temperature = top_k, temperature
        self._shared_vocab = min(vocab_size, decoder.spec.vocab_size)
        self._lengths, self._batch_size = tuple(lengths), batch_size
        self._mesh = mesh

    def targets(self, batch: Batch) -> TeacherTargets:
        """See `protocol.Teacher`. Dispatched, not waited for."""
        batch = sharding.shard_rows(self._mesh, batch)
        hidden_BNE = predicting_hidden(
            self.decoder,
            self.params,
            batch.teacher_tokens_BT,
            batch.teacher_mask_BT,
            batch.teacher_at_BN,
        )
        spec = self.decoder.spec
        table = self.params["embedding" if spec.tied_embedding else "unembedding"]
        dense = DenseTargets(hidden_BNE, table, spec.final_softcap)
        if self._top_k is None:
            return dense
        return _top_k_targets(
            dense, batch.target_ids_BN, self._top_k, self._temperature, self._shared_vocab
        )

    def sample(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampling: Sampling
    ) -> list[Trajectory]:
        """See `protocol.Teacher`."""
        return sample(
            self.decoder,
            self.params,
            prompts,
            seeds,
            sampling,
            stop_ids=self.chat.stop_ids,
            batch_size=self._batch_size,
            lengths=self._lengths,
            mesh=self._mesh,
        )


@functools.partial(jax.jit, static_argnames="decoder")
def predicting_hidden(decoder: Decoder, params, tokens_BT, mask_BT, at_BN) -> jax.Array:
    """Hidden states [B,N,E] at the positions that predict the targets."""
    hidden_BTE = decoder.apply({"params": params}, tokens_BT, mask_BT)
    return jnp.take_along_axis(hidden_BTE, at_BN[:, :, None], axis=1)


@functools.partial(jax.jit, static_argnames=("k", "temperature", "vocab_size"))
def _top_k_targets(
    dense: DenseTargets, target_ids_BN, k: int, temperature: float, vocab_size: int
) -> TopKTargets:
    logits_BNV = unembed(dense.hidden_BNE, dense.unembedding_VE[:vocab_size], dense.softcap)
    logprobs_BNV = jax.nn.log_softmax(logits_BNV / temperature, axis=-1)
    target_logprob_BN1 = jnp.take_along_axis(logprobs_BNV, target_ids_BN[:, :, None], axis=-1)
    return TopKTargets(top_k_logprobs(logits_BNV, k, temperature), target_logprob_BN1[:, :, 0])
