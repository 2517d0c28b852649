"""Text from a decoder: prefill, then one token of every row at a time, in one jitted program.

Knows token ids only, nothing of tokenizers. Shape letters: B rows, P prompt positions (padded on
the left, so that all rows write the same cache slot), N new tokens, V vocabulary, E width, K top-k
entries; 1 is an axis of length one.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gkdjax.config import Config
from gkdjax.losses import top_k_logprobs
from gkdjax.losses.objective import TopKTargets
from gkdjax.losses.topk import TokenHidden, TokenTopK
from gkdjax.models.decoder import Decoder
from gkdjax.models.kv_cache import Cache
from gkdjax.models.sampling import sample_token
from gkdjax.parallel.mesh import ROWS, WHOLE, fetch, shard_rows
from gkdjax.types import Completion, SamplingParams


def sampling(config: Config) -> SamplingParams:
    """Reads how responses are sampled, whoever writes them."""
    c = config.rollout
    return SamplingParams(c.max_new_tokens, c.temperature, c.top_p, c.top_k)


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which predictions become `Completion.cached`: the loss's, however tokens are sampled."""

    top_k: int | None  # K for `TokenTopK`; None for `TokenHidden`, which ignores the other fields
    temperature: float  # log-probabilities of softmax(logits / temperature)
    vocab_size: int | None = None  # ids below it are the vocabulary, others have logprob -inf


def sample(
    decoder: Decoder,
    params: dict,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    sampling: SamplingParams,
    *,
    stop_ids: Sequence[int],
    batch_size: int,
    lengths: Sequence[int],
    mesh: Mesh | None = None,
    keep: Keep | None = None,
    prefix: Cache | None = None,
    vocab_size: int | None = None,
) -> list[Completion]:
    """Writes one completion for each prompt; it depends on prompt and seed, not on other rows.

    Args:
      params: the decoder's, adapters attached or not.
      prompts: int32 [p] each, p >= 1.
      seeds: one non-negative int below 2**32 a prompt.
      stop_ids: ids that end a row; the one sampled is part of the completion.
      batch_size: rows computed at once; the last batch is filled up with copies.
      lengths: padded prompt lengths to choose from; few of them mean few compilations.
      mesh: its devices share the rows, and along "tensor" the heads. None: wherever `params` are.
      keep: which predictions to keep, so that the text need not be read again to be scored.
      prefix: the text that every row has read before its prompt, see `decoder.read_prefix`.
      vocab_size: only ids below it are sampled: another model that reads them may have fewer.

    Raises:
      ValueError: a prompt is empty or longer than every length; `keep.top_k` is outside
        [1, vocabulary]; `keep.temperature` is not positive and finite.
    """
    program = Program(decoder, sampling.max_new_tokens, sampling.top_k, keep, vocab_size, mesh)
    numbers = np.float32(sampling.temperature), np.float32(sampling.top_p)
    how = (np.asarray(stop_ids, np.int32), *numbers)
    completions: list[Completion] = []
    for start in range(0, len(prompts), batch_size):
        chunk = list(range(start, min(start + batch_size, len(prompts))))
        filled = chunk + [chunk[-1]] * (batch_size - len(chunk))
        tokens_BP, mask_BP = _left_pad([prompts[i] for i in filled], lengths)
        rows = (tokens_BP, mask_BP, np.asarray([seeds[i] for i in filled], np.uint32))
        rows = rows if mesh is None else shard_rows(mesh, rows)
        tokens_BN, length_B, done_B, cached = fetch(program.run(params, rows, how, prefix))
        for row in range(len(chunk)):
            n = length_B[row]
            # Copies, because a slice would hold on to the arrays of the whole batch.
            own = jax.tree.map(lambda x_BN, row=row, n=n: x_BN[row, :n].copy(), cached)
            if isinstance(own, TopKTargets):
                own = TokenTopK(own.topk, own.target_logprob_BN)
            elif own is not None:
                own = TokenHidden(own)
            completions.append(Completion(tokens_BN[row, :n], bool(done_B[row]), own))
    return completions


def _left_pad(prompts: Sequence[np.ndarray], lengths: Sequence[int]):
    longest = max(map(len, prompts))
    if not min(map(len, prompts)):
        raise ValueError("a prompt has no tokens: there is nothing to predict the first token from")
    fitting = [length for length in lengths if length >= longest]
    if not fitting:
        raise ValueError(f"a prompt has {longest} tokens; the longest padded length is {lengths}")
    P = min(fitting)
    mask_BP = np.stack([np.arange(P) >= P - len(prompt) for prompt in prompts])
    tokens_BP = np.zeros(mask_BP.shape, np.int32)
    tokens_BP[mask_BP] = np.concatenate(prompts)
    return tokens_BP, mask_BP


class _State(NamedTuple):
    step: jax.Array  # int32 scalar, tokens sampled so far
    tokens_BN: jax.Array  # int32, 0 where nothing was sampled
    length_B: jax.Array  # int32, tokens of the row, a stop id included
    done_B: jax.Array  # bool, the row has a stop id
    cache: Cache  # of all tokens but the last one
    cached: TopKTargets | jax.Array | None  # [B,N,...]; the array is hidden_BNE


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled sampler. Whatever may change between calls is an argument of `run`."""

    decoder: Decoder
    max_new_tokens: int
    top_k: int | None
    keep: Keep | None
    vocab_size: int | None
    mesh: Mesh | None

    @functools.partial(jax.jit, static_argnums=0)
    def run(self, params, rows, how, prefix):
        """-> (tokens [B,N], length [B], done [B], what `keep` asks for [B,N,...]).

        `rows` are prompts and their mask [B,P], and seeds [B]; `how` is stop ids, temperature and
        top_p.
        """
        if self.mesh is None:
            return self._run(params, rows, how, prefix)
        # Devices that share rows loop on their own until these are done. Left to the partitioner,
        # every step would ask all devices for that, and top_k gather the logits of all rows. What
        # "fsdp" cuts is gathered once: each new token reads every weight. "tensor" is left to the
        # partitioner; where it cuts nothing, that has one axis less to look at.
        tensor = {"tensor"} if self.mesh.shape["tensor"] > 1 else set()
        return jax.shard_map(
            self._run,
            mesh=self.mesh,
            in_specs=(WHOLE, ROWS, WHOLE, WHOLE),
            out_specs=ROWS,
            axis_names=set(self.mesh.axis_names) - tensor,
            check_vma=False,
        )(params, rows, how, prefix)

    def _run(self, params, rows, how, prefix):
        tokens_BP, mask_BP, seeds_B = rows
        stop_ids, temperature, top_p = how
        (B, P), N = tokens_BP.shape, self.max_new_tokens
        apply = functools.partial(self.decoder.apply, {"params": params})
        keys_B = jax.vmap(jax.random.key)(seeds_B)

        def sample_next(state: _State, hidden_B1E) -> _State:
            logits_B1V = apply(hidden_B1E, method="unembed")
            logits_BV = logits_B1V[:, 0, : self.vocab_size]
            step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.step)
            sampled_B = sample_token(logits_BV, step_keys_B, temperature, self.top_k, top_p)
            token_B1 = jnp.where(state.done_B, 0, sampled_B)[:, None]
            cached = self._predictions(hidden_B1E, logits_B1V, token_B1)
            put = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=state.step, axis=1
            )
            return _State(
                step=state.step + 1,
                tokens_BN=put(state.tokens_BN, token_B1),
                length_B=state.length_B + (~state.done_B).astype(jnp.int32),
                done_B=state.done_B | jnp.any(token_B1 == stop_ids[None, :], axis=1),
                cache=state.cache,
                cached=jax.tree.map(put, state.cached, cached),
            )

        def read_and_sample(state: _State) -> _State:
            last_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BN, state.step - 1, 1, axis=1)
            alive_B1 = ~state.done_B[:, None]
            hidden_B1E, cache = apply(last_B1, alive_B1, state.cache, prefix, method="extend")
            return sample_next(state._replace(cache=cache), hidden_B1E)

        def unfinished(state: _State):
            return (state.step < N) & ~jnp.all(state.done_B)

        # The last token is not read, and its slot stays empty: P + N is the rounder number.
        hidden_BPE, cache = apply(tokens_BP, mask_BP, P + N, prefix, method="prefill")
        hidden_B1E = hidden_BPE[:, -1:]
        one = jax.eval_shape(
            lambda h: self._predictions(h, apply(h, method="unembed"), tokens_BP[:, :1]), hidden_B1E
        )
        start = _State(
            step=jnp.zeros((), jnp.int32),
            tokens_BN=jnp.zeros((B, N), jnp.int32),
            length_B=jnp.zeros((B,), jnp.int32),
            done_B=jnp.zeros((B,), bool),
            cache=cache,
            cached=jax.tree.map(lambda x_B1: jnp.zeros((B, N, *x_B1.shape[2:]), x_B1.dtype), one),
        )
        end = jax.lax.while_loop(unfinished, read_and_sample, sample_next(start, hidden_B1E))
        return end.tokens_BN, end.length_B, end.done_B, end.cached

    def _predictions(self, hidden_B1E, logits_B1V, token_B1):
        """The part of `_State.cached` of one step."""
        keep = self.keep
        if keep is None:
            return None
        if keep.top_k is None:
            return hidden_B1E
        logits_B1V = logits_B1V[:, :, : keep.vocab_size]
        topk = top_k_logprobs(logits_B1V, keep.top_k, keep.temperature)
        logprobs_B1V = jax.nn.log_softmax(logits_B1V / keep.temperature, axis=-1)
        logprob_B11 = jnp.take_along_axis(
            logprobs_B1V, token_B1[:, :, None], axis=-1, mode="fill", fill_value=-jnp.inf
        )
        return TopKTargets(topk, logprob_B11[:, :, 0])
