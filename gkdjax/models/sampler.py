"""Text from a decoder: prefill, then one token of every row at a time, in one jitted program.

Knows token ids only, nothing of tokenizers. Shape letters: B rows, P prompt positions (padded on
the left, so that all rows write the same cache slot), N new tokens, V vocabulary, E width, K top-k
entries; 1 is a kept axis of length one.
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
from gkdjax.models import sampling as models_sampling
from gkdjax.models.decoder import Decoder
from gkdjax.models.kv_cache import Cache, Prefix
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.types import Completion, SamplingParams


@dataclasses.dataclass(frozen=True)
class Keep:
    """What of the predictions that the tokens are drawn from becomes `Completion.kept`.

    It does not depend on how tokens are drawn: temperature and vocabulary are those of the loss.

    Attributes:
      top_k: K for `TokenTopK`; None for `TokenHidden`, to which the rest does not apply.
      temperature: the log-probabilities are those of softmax(logits / temperature).
      vocab_size: the ids below it are the whole vocabulary, and a token drawn from beyond has
        logprob -inf; None: all ids.
    """

    top_k: int | None
    temperature: float
    vocab_size: int | None = None


class _State(NamedTuple):
    step: jax.Array  # int32 scalar, tokens drawn so far
    tokens_BN: jax.Array  # int32, 0 where nothing was drawn
    length_B: jax.Array  # int32, tokens of the row, a stop id included
    done_B: jax.Array  # bool, the row has drawn a stop id
    cache: Cache  # of all tokens but the last one drawn
    kept: TopKTargets | jax.Array | None  # [B,N,...], the array is hidden_BNE


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
    prefix: Prefix | None = None,
    vocab_size: int | None = None,
) -> list[Completion]:
    """One completion for each prompt.

    A row's draws depend on its own seed and on what it has read, not on its neighbours.

    Args:
      decoder: any; its compute dtype is used.
      params: its parameters, adapters attached or not.
      prompts: int32 [p] each, p >= 1.
      seeds: one non-negative int below 2**32 a prompt.
      sampling: how to draw.
      stop_ids: ids that end a row; the one drawn is part of the completion.
      batch_size: rows computed at once; a smaller last batch is filled up and cut.
      lengths: padded prompt lengths to choose from; few of them means few compilations.
      mesh: its devices share the rows, and along "tensor" the heads. None: wherever `params` are.
      keep: what to keep of each prediction, so that the text need not be read again to be scored;
        None: nothing, at no cost.
      prefix: from `decoder.read_prefix`: what every row has read before its prompt.
      vocab_size: only ids below it are drawn, as another model that is to read them may have fewer
        rows in its embedding; None: all ids.

    Raises:
      ValueError: a prompt is empty or longer than every length; `keep.top_k` is outside
        [1, vocabulary]; `keep.temperature` is not positive and finite.
    """
    completions: list[Completion] = []
    for start in range(0, len(prompts), batch_size):
        chunk = list(range(start, min(start + batch_size, len(prompts))))
        filled = chunk + [chunk[-1]] * (batch_size - len(chunk))
        tokens_BP, mask_BP = _left_pad([prompts[i] for i in filled], lengths)
        rows = (tokens_BP, mask_BP, np.asarray([seeds[i] for i in filled], np.uint32))
        tokens_BN, length_B, done_B, kept = parallel_mesh.fetch(
            _generate(
                decoder,
                params,
                rows if mesh is None else parallel_mesh.shard_rows(mesh, rows),
                np.asarray(stop_ids, np.int32),
                np.float32(sampling.temperature),
                np.float32(sampling.top_p),
                sampling.top_k,
                sampling.max_new_tokens,
                keep,
                mesh,
                prefix,
                vocab_size,
            )
        )
        for row in range(len(chunk)):
            n = length_B[row]
            completions.append(
                Completion(tokens_BN[row, :n], bool(done_B[row]), _kept_of(kept, row, n))
            )
    return completions


def _left_pad(prompts: Sequence[np.ndarray], lengths: Sequence[int]):
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("a prompt has no tokens: there is nothing to predict the first token from")
    fitting = [length for length in lengths if length >= longest]
    if not fitting:
        raise ValueError(f"a prompt has {longest} tokens; the longest padded length is {lengths}")
    P = min(fitting)
    tokens_BP = np.zeros((len(prompts), P), np.int32)
    mask_BP = np.zeros((len(prompts), P), bool)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, P - len(prompt) :] = prompt
        mask_BP[row, P - len(prompt) :] = True
    return tokens_BP, mask_BP


def _kept_of(kept: TopKTargets | np.ndarray | None, row: int, n: int):
    """Copies, because a slice would hold on to the arrays of the whole batch."""
    kept = jax.tree.map(lambda values_BN: values_BN[row, :n].copy(), kept)
    if isinstance(kept, TopKTargets):
        return TokenTopK(kept.topk, kept.target_logprob_BN)
    return None if kept is None else TokenHidden(kept)


@functools.partial(
    jax.jit, static_argnames=("decoder", "top_k", "max_new_tokens", "keep", "mesh", "vocab_size")
)
def _generate(
    decoder,
    params,
    rows,
    stop_ids,
    temperature,
    top_p,
    top_k,
    max_new_tokens,
    keep,
    mesh,
    prefix,
    vocab_size,
):
    """Everything that may change between calls is an argument: no stale constant is compiled in."""
    generate = functools.partial(_generate_rows, decoder, top_k, max_new_tokens, keep, vocab_size)
    if mesh is not None:
        # Devices that share rows loop for their own, until they are done. Left to the partitioner,
        # every step would ask all devices for that, and top_k gather the logits of all rows. What
        # "fsdp" cuts is gathered once: each new token reads every weight. "tensor" is left to the
        # partitioner, or where it cuts nothing, is one axis less for it to look at.
        axes = set(mesh.axis_names)
        if mesh.shape["tensor"] > 1:
            axes -= {"tensor"}
        cut, whole = parallel_mesh.ROWS, parallel_mesh.WHOLE
        generate = jax.shard_map(
            generate,
            mesh=mesh,
            in_specs=(whole, cut, whole, whole),
            out_specs=cut,
            axis_names=axes,
            check_vma=False,
        )
    return generate(params, rows, (stop_ids, temperature, top_p), prefix)


def _generate_rows(
    decoder: Decoder,
    top_k,
    max_new_tokens,
    keep: Keep | None,
    vocab_size,
    params,
    rows,
    how,
    prefix,
):
    tokens_BP, mask_BP, seeds_B = rows
    stop_ids, temperature, top_p = how
    apply = functools.partial(decoder.apply, {"params": params})
    keys_B = jax.vmap(jax.random.key)(seeds_B)

    def draw(state: _State, hidden_B1E) -> _State:
        logits_B1V = apply(hidden_B1E, method="unembed")
        step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.step)
        logits_BV = logits_B1V[:, 0, :vocab_size]
        drawn_B = models_sampling.sample_token(logits_BV, step_keys_B, temperature, top_k, top_p)
        token_B1 = jnp.where(state.done_B, 0, drawn_B)[:, None]
        return _write(state, token_B1, stop_ids, _to_keep(keep, hidden_B1E, logits_B1V, token_B1))

    def read_and_draw(state: _State) -> _State:
        last_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BN, state.step - 1, 1, axis=1)
        alive_B1 = ~state.done_B[:, None]
        hidden_B1E, cache = apply(last_B1, alive_B1, state.cache, prefix, method="extend")
        return draw(state._replace(cache=cache), hidden_B1E)

    def unfinished(state: _State):
        return (state.step < max_new_tokens) & ~jnp.all(state.done_B)

    start, hidden_B1E = _prefill(apply, tokens_BP, mask_BP, max_new_tokens, keep, prefix)
    end = jax.lax.while_loop(unfinished, read_and_draw, draw(start, hidden_B1E))
    return end.tokens_BN, end.length_B, end.done_B, end.kept


def _prefill(apply, tokens_BP, mask_BP, N: int, keep: Keep | None, prefix: Prefix | None):
    """-> (the state before the first draw, the hidden states that predict the first token)."""
    B, P = tokens_BP.shape
    # The last token is not read, and its slot stays empty: P + N is the rounder number.
    hidden_BPE, cache = apply(tokens_BP, mask_BP, P + N, prefix, method="prefill")
    hidden_B1E = hidden_BPE[:, -1:]
    one = jax.eval_shape(
        lambda: _to_keep(keep, hidden_B1E, apply(hidden_B1E, method="unembed"), tokens_BP[:, :1])
    )
    state = _State(
        step=jnp.zeros((), jnp.int32),
        tokens_BN=jnp.zeros((B, N), jnp.int32),
        length_B=jnp.zeros((B,), jnp.int32),
        done_B=jnp.zeros((B,), bool),
        cache=cache,
        kept=jax.tree.map(lambda at_B1: jnp.zeros((B, N, *at_B1.shape[2:]), at_B1.dtype), one),
    )
    return state, hidden_B1E


def _write(state: _State, token_B1, stop_ids, to_keep) -> _State:
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=state.step, axis=1)
    return state._replace(
        step=state.step + 1,
        tokens_BN=write(state.tokens_BN, token_B1),
        length_B=state.length_B + (~state.done_B).astype(jnp.int32),
        done_B=state.done_B | jnp.any(token_B1 == stop_ids[None, :], axis=1),
        kept=jax.tree.map(write, state.kept, to_keep),
    )


def _to_keep(keep: Keep | None, hidden_B1E, logits_B1V, token_B1):
    """What `_State.kept` holds, of one step."""
    if keep is None:
        return None
    if keep.top_k is None:
        return hidden_B1E
    logits_B1V = logits_B1V[:, :, : keep.vocab_size]
    topk = top_k_logprobs(logits_B1V, keep.top_k, keep.temperature)
    logprobs_B1V = jax.nn.log_softmax(logits_B1V / keep.temperature, axis=-1)
    drawn_B11 = jnp.take_along_axis(
        logprobs_B1V, token_B1[:, :, None], axis=-1, mode="fill", fill_value=-jnp.inf
    )
    return TopKTargets(topk, drawn_B11[:, :, 0])


def sampling(config: Config) -> SamplingParams:
    """How responses are drawn, whoever writes them."""
    c = config.rollout
    return SamplingParams(c.max_new_tokens, c.temperature, c.top_p, c.top_k)
