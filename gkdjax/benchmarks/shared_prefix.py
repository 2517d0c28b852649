"""What a prefix costs that all rows share: read by each row, read once, or kept from before.

    JAX_PLATFORMS=cpu python -m gkdjax.benchmarks.shared_prefix

Hidden states of rows x length tokens after a prefix, without the head. Each round times every way
once, one after the other; ratios are of the same round's first way.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gkdjax.benchmarks.case import TEACHERS, Shape, decoder_spec
from gkdjax.models.decoder import Decoder, read_prefix
from gkdjax.models.decoder_config import param_shapes
from gkdjax.utils.text import table

VOCAB = 1024  # only rows of the embedding are read


def main() -> None:
    parser = argparse.ArgumentParser("shared_prefix", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=TEACHERS, default="small", help="Of the model.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prefix", type=int, default=2048, help="Tokens of the prefix.")
    parser.add_argument("--rows", type=int, default=8, help="Of the batch.")
    parser.add_argument("--length", type=int, default=128, help="Tokens of a row after the prefix.")
    parser.add_argument("--rounds", type=int, default=5, help="Timed, after one that is not.")
    a = parser.parse_args()
    decoder, params = model(TEACHERS[a.shape], jnp.dtype(a.dtype))
    measured = measure(params, ways(decoder, a.rows, a.prefix, a.length), a.rounds)
    first, _ = measured["each row reads it"]
    rows = []
    for name, (seconds, temp_bytes) in measured.items():
        ratios = [each / own for each, own in zip(first, seconds, strict=True)]
        cells = f"{statistics.median(seconds):.3f}", f"{statistics.median(ratios):.1f}"
        rows.append([name, *cells, f"{temp_bytes / 2**30:.2f}"])
    print(table(["the prefix", "s", "times as fast", "scratch, GiB"], rows))


def model(shape: Shape, dtype: jnp.dtype) -> tuple[Decoder, dict]:
    """Random weights of one of `case.STUDENTS` or `case.TEACHERS`."""
    spec, rng = decoder_spec(shape, VOCAB), np.random.default_rng(0)
    leaves = {
        path: jnp.asarray(0.02 * rng.standard_normal(shape, np.float32), dtype)
        for path, shape in param_shapes(spec).items()
    }
    decoder = Decoder(spec, param_dtype=dtype, compute_dtype=dtype)
    return decoder, traverse_util.unflatten_dict(leaves, sep="/")


def ways(decoder: Decoder, B: int, P: int, T: int) -> dict:
    """Name -> (jitted function of the parameters and more, those to be made of the parameters).

    All functions have the same result.
    """
    rng = np.random.default_rng(0)
    prefix_1P = rng.integers(0, VOCAB, (1, P)).astype(np.int32)
    tokens_BT = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
    whole = np.concatenate([np.broadcast_to(prefix_1P, (B, P)), tokens_BT], axis=1)

    def each_row(params, tokens):
        hidden = decoder.apply({"params": params}, tokens, jnp.ones(tokens.shape, bool))
        return hidden[:, P:]

    def read(params, tokens):
        return read_prefix(decoder, params, tokens, jnp.ones(tokens.shape, bool))

    def after(params, prefix, tokens):
        return decoder.apply({"params": params}, tokens, jnp.ones(tokens.shape, bool), prefix)

    def once(params, prefix_tokens, tokens):
        return after(params, read(params, prefix_tokens), tokens)

    return {
        "each row reads it": (jax.jit(each_row), lambda params: (whole,)),
        "read once": (jax.jit(once), lambda params: (prefix_1P, tokens_BT)),
        "kept from before": (
            jax.jit(after),
            lambda params: (jax.jit(read)(params, prefix_1P), tokens_BT),
        ),
    }


def measure(params: dict, ways: dict, rounds: int) -> dict:
    """Name -> (seconds of each round, bytes of scratch memory)."""
    programs, results = {}, {}
    for name, (function, arguments) in ways.items():
        others = jax.device_put(arguments(params))
        compiled = function.lower(params, *others).compile()
        programs[name] = functools.partial(compiled, params, *others)
        results[name] = ([], compiled.memory_analysis().temp_size_in_bytes)
        jax.block_until_ready(programs[name]())
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            results[name][0].append(time.perf_counter() - start)
    return results


if __name__ == "__main__":
    main()
