"""Text from a decoder: prefill, then one token of every row at a time, in one jitted program.

Knows token ids only, nothing of tokenizers. Shape letters: B rows, P prompt positions (padded on
the left, so that all rows write the same cache slot), N new tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gkdjax import sharding
from gkdjax.models.decoder import Cache, Decoder, init_cache
from gkdjax.types import Trajectory


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      max_new_tokens: N; a row that has not stopped by then is cut off.
      temperature: divides the logits; 0 takes the most probable token.
      top_p: draw from the smallest set of tokens whose probability reaches it; 1 draws from all.
    """

    max_new_tokens: int
    temperature: float
    top_p: float


class _State(NamedTuple):
    step: jax.Array  # int32 scalar, tokens drawn so far
    tokens_BN: jax.Array  # int32, 0 where nothing was drawn
    length_B: jax.Array  # int32, tokens of the row, a stop id included
    done_B: jax.Array  # bool, the row has drawn a stop id
    logits_BV: jax.Array  # float32, of the next token
    cache: Cache


def sample(
    decoder: Decoder,
    params: dict,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    batch_size: int,
    lengths: Sequence[int],
    mesh: Mesh | None = None,
) -> list[Trajectory]:
    """One trajectory for each prompt.

    A row's draws depend on its own seed and on what it has read, not on its neighbours.

    Args:
      decoder: any; its compute dtype is used.
      params: its parameters, adapters attached or not.
      prompts: int32 [p] each, p >= 1.
      seeds: one non-negative int below 2**32 a prompt.
      sampling: how to draw.
      stop_ids: ids that end a row; the one drawn is part of the trajectory.
      batch_size: rows computed at once; a smaller last batch is filled up and cut.
      lengths: padded prompt lengths to choose from; few of them means few compilations.
      mesh: its devices share the rows; `params` are on all of them. None: wherever `params` are.

    Raises:
      ValueError: a prompt is empty or longer than every length.
    """
    trajectories: list[Trajectory] = []
    for start in range(0, len(prompts), batch_size):
        chunk = list(range(start, min(start + batch_size, len(prompts))))
        filled = chunk + [chunk[-1]] * (batch_size - len(chunk))
        tokens_BP, mask_BP = _left_pad([prompts[i] for i in filled], lengths)
        rows = (tokens_BP, mask_BP, np.asarray([seeds[i] for i in filled], np.uint32))
        tokens_BN, length_B, done_B = jax.device_get(
            _generate(
                decoder,
                params,
                *(rows if mesh is None else sharding.shard_rows(mesh, rows)),
                np.asarray(stop_ids, np.int32),
                np.float32(sampling.temperature),
                np.float32(sampling.top_p),
                sampling.max_new_tokens,
            )
        )
        for row in range(len(chunk)):
            ids = tokens_BN[row, : length_B[row]]
            trajectories.append(Trajectory(ids=ids, finished=bool(done_B[row])))
    return trajectories


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


@functools.partial(jax.jit, static_argnames=("decoder", "max_new_tokens"))
def _generate(
    decoder, params, tokens_BP, mask_BP, seeds_B, stop_ids, temperature, top_p, max_new_tokens
):
    """Everything that may change between calls is an argument: no stale constant is compiled in."""
    B, P = tokens_BP.shape
    variables = {"params": params}

    def read(tokens, mask, cache):
        hidden, cache = decoder.apply(variables, tokens, mask, cache, method="extend")
        return decoder.apply(variables, hidden[:, -1], method="unembed"), cache

    cache = init_cache(decoder.spec, B, P + max_new_tokens, decoder.compute_dtype)
    logits_BV, cache = read(tokens_BP, mask_BP, cache)
    keys_B = jax.vmap(jax.random.key)(seeds_B)

    def unfinished(state: _State):
        return (state.step < max_new_tokens) & ~jnp.all(state.done_B)

    def draw_and_read(state: _State) -> _State:
        step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.step)
        drawn_B = _draw(state.logits_BV, step_keys_B, temperature, top_p)
        alive_B = ~state.done_B
        token_B = jnp.where(alive_B, drawn_B, 0)
        stopped_B = jnp.any(token_B[:, None] == stop_ids[None, :], axis=1)
        logits_BV, cache = read(token_B[:, None], alive_B[:, None], state.cache)
        return _State(
            step=state.step + 1,
            tokens_BN=jax.lax.dynamic_update_slice_in_dim(
                state.tokens_BN, token_B[:, None], state.step, axis=1
            ),
            length_B=state.length_B + alive_B.astype(jnp.int32),
            done_B=state.done_B | stopped_B,
            logits_BV=logits_BV,
            cache=cache,
        )

    start = _State(
        step=jnp.zeros((), jnp.int32),
        tokens_BN=jnp.zeros((B, max_new_tokens), jnp.int32),
        length_B=jnp.zeros((B,), jnp.int32),
        done_B=jnp.zeros((B,), bool),
        logits_BV=logits_BV,
        cache=cache,
    )
    end = jax.lax.while_loop(unfinished, draw_and_read, start)
    return end.tokens_BN, end.length_B, end.done_B


def _draw(logits_BV, keys_B, temperature, top_p) -> jax.Array:
    """int32 [B], by inverting the cumulative sum of the probabilities (one uniform a row)."""

    def greedy():
        return jnp.argmax(logits_BV, axis=-1)

    def stochastic():
        scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
        probs_BV = jax.nn.softmax(scaled_BV, axis=-1)
        uniform_B = jax.vmap(jax.random.uniform)(keys_B)
        return jax.lax.cond(
            top_p < 1.0,
            lambda: _invert_nucleus(probs_BV, uniform_B, top_p),
            lambda: _invert(probs_BV, uniform_B),
        )

    return jax.lax.cond(temperature > 0.0, stochastic, greedy).astype(jnp.int32)


def _invert(probs_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index whose cumulative sum passes uniform x total; never one of probability 0."""
    cumulative_BV = jnp.cumsum(probs_BV, axis=-1)
    threshold_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    # Rounding may put the threshold on the total itself, past which no index lies.
    threshold_B1 = jnp.minimum(threshold_B1, jnp.nextafter(cumulative_BV[:, -1:], 0.0))
    return jnp.argmax(cumulative_BV > threshold_B1, axis=-1)


def _invert_nucleus(probs_BV: jax.Array, uniform_B: jax.Array, top_p: jax.Array) -> jax.Array:
    """`_invert` within the nucleus (Holtzman et al. 2020, arXiv:1904.09751)."""
    order_BV = jnp.argsort(-probs_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(probs_BV, order_BV, axis=-1)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    nucleus_BV = jnp.where(before_BV < top_p, sorted_BV, 0.0)
    rank_B = _invert(nucleus_BV, uniform_B)
    return jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0]
