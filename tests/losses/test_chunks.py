"""Cutting tokens into chunks: order, what is left out, and how many chunks are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax.losses.chunks import Chunks, over_chunks


def count_and_double(carry, chunk):
    """Counts the chunks; leaves what it saw."""
    return carry + 1, (2 * chunk, chunk)


@pytest.mark.parametrize(
    ("kept", "shards", "size", "chunks"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 1, 3, 3),
        ([0, 1, 2, 3, 4, 5, 6, 7], 1, 100, 1),
        ([5], 1, 3, 1),
        ([], 1, 3, 0),
        ([1, 2, 6], 1, 2, 2),
        ([0, 1, 2, 3], 2, 2, 2),  # the first shard has all: it needs two chunks, and so do both
        ([0, 1, 6, 7], 2, 2, 1),
        ([0, 7], 4, 1, 1),
    ],
)
def test_only_chunks_that_hold_a_token_are_computed(kept, shards, size, chunks):
    tokens = jnp.arange(1, 9, dtype=jnp.float32).reshape(4, 2)
    mask = np.isin(np.arange(8), kept).reshape(4, 2)
    run = jax.jit(lambda x, m: over_chunks(count_and_double, 0, x, m, Chunks(size, shards)))
    count, (doubled, seen) = run(tokens, mask)
    assert count == chunks
    np.testing.assert_array_equal(doubled, np.where(mask, 2 * tokens, 0))
    np.testing.assert_array_equal(seen, np.where(mask, tokens, 0))


def test_tokens_come_in_their_order_and_the_last_chunk_is_filled_with_zeros():
    tokens = jnp.arange(1, 9, dtype=jnp.float32).reshape(2, 4)
    mask = np.array([[1, 0, 1, 1], [0, 1, 0, 1]], bool)

    def collect(carry, chunk):
        return jnp.concatenate([carry[:, 3:], chunk], axis=1), chunk

    start = jnp.full((1, 6), -1.0)
    carry, _ = over_chunks(collect, start, tokens, mask, Chunks(3, 1))
    np.testing.assert_array_equal(carry, [[1, 3, 4, 6, 8, 0]])


def test_rows_that_the_shards_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="shards must divide the 3 rows, got 2"):
        over_chunks(count_and_double, 0, jnp.ones((3, 2)), jnp.ones((3, 2), bool), Chunks(2, 2))
