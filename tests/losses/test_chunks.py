"""Cutting tokens into chunks: order, what is left out, and how many chunks are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from gkdjax.losses.chunks import Chunks, over_chunks


def chunks_of(size, devices):
    if devices == 1:
        return Chunks(size, None)
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
    return Chunks(size, mesh, ("data",))


@pytest.mark.parametrize(
    ("kept", "devices", "size", "chunks"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 1, 3, 3),
        ([0, 1, 2, 3, 4, 5, 6, 7], 1, 100, 1),
        ([5], 1, 3, 1),
        ([], 1, 3, 0),
        ([1, 2, 6], 1, 2, 2),
        ([0, 1, 2, 3], 2, 2, 2),  # the first device has all of them, the second computes nothing
        ([0, 1, 6, 7], 2, 2, 2),  # one chunk each
        ([0, 7], 4, 1, 2),
    ],
)
def test_only_chunks_that_hold_a_token_are_computed(kept, devices, size, chunks):
    tokens = jnp.arange(1, 9, dtype=jnp.float32).reshape(4, 2)
    mask = np.isin(np.arange(8), kept).reshape(4, 2)
    counter = jax.ShapeDtypeStruct((), jnp.int32)

    def count_and_double(count, chunk, factor):
        return count + 1, (factor * chunk, chunk)

    how = chunks_of(size, devices)
    run = jax.jit(lambda x, m: over_chunks(count_and_double, counter, x, 2.0, m, how))
    count, (doubled, seen) = run(tokens, mask)
    assert count == chunks
    np.testing.assert_array_equal(doubled, np.where(mask, 2 * tokens, 0))
    np.testing.assert_array_equal(seen, np.where(mask, tokens, 0))


def test_tokens_come_in_their_order_and_the_last_chunk_is_filled_with_zeros():
    tokens = jnp.arange(1, 9, dtype=jnp.float32).reshape(2, 4)
    mask = np.array([[1, 0, 1, 1], [0, 1, 0, 1]], bool)

    def collect(seen, chunk, shared):
        del shared
        return jnp.concatenate([seen[3:], chunk]), chunk

    like = jax.ShapeDtypeStruct((6,), jnp.float32)
    seen, _ = over_chunks(collect, like, tokens, None, mask, Chunks(3, None))
    np.testing.assert_array_equal(seen, [1, 3, 4, 6, 8, 0])
