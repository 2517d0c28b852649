"""What a prefix costs that all rows share: read by each row, read once, or kept from before.

    JAX_PLATFORMS=cpu python -m gkdjax.benchmarks.shared_prefix

Hidden states of rows x length tokens after a prefix, without the head. Each round times every way
once, one after the other; ratios are of the same round's first way.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from gkdjax.benchmarks.case import TEACHERS, decoder_spec
from gkdjax.models.decoder import Decoder
from gkdjax.models.spec import param_shapes
from gkdjax.progress import table

_SHAPE = flags.DEFINE_enum("shape", "small", list(TEACHERS), "Of the model.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and products.")
_PREFIX = flags.DEFINE_integer("prefix", 2048, "Tokens of the prefix.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 8, "Of the batch.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens of a row after the prefix.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed, after one that is not.", lower_bound=1)

VOCAB = 1024  # only rows of the embedding are read


def main(argv: list[str]) -> None:
    del argv
    measured = measure(_ROUNDS.value)
    first = measured["each row reads it"]
    rows = []
    for name, (seconds, temp_bytes) in measured.items():
        ratios = [a / b for a, b in zip(first[0], seconds, strict=True)]
        cells = f"{statistics.median(seconds):.3f}", f"{statistics.median(ratios):.1f}"
        rows.append([name, *cells, f"{temp_bytes / 2**30:.2f}"])
    print(table(["the prefix", "s", "times as fast", "scratch, GiB"], rows))


def ways(decoder: Decoder, rng: np.random.Generator) -> dict:
    """Name -> (jitted function of the parameters and more, those to be made of the parameters).

    All functions have the same result.
    """
    B, P, T = _ROWS.value, _PREFIX.value, _LENGTH.value
    prefix_1P = rng.integers(0, VOCAB, (1, P)).astype(np.int32)
    tokens_BT = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
    whole = np.concatenate([np.broadcast_to(prefix_1P, (B, P)), tokens_BT], axis=1)

    def each_row(params, tokens):
        hidden = decoder.apply({"params": params}, tokens, jnp.ones(tokens.shape, bool))
        return hidden[:, P:]

    def read(params, tokens):
        ones = jnp.ones(tokens.shape, bool)
        return decoder.apply({"params": params}, tokens, ones, method="read_prefix")

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


def measure(rounds: int) -> dict:
    """Name -> (seconds of each round, bytes of scratch memory)."""
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(_DTYPE.value)
    spec = decoder_spec(TEACHERS[_SHAPE.value], VOCAB)
    params: dict = {"layers": {}}
    for path, shape in param_shapes(spec).items():
        folder, _, name = path.rpartition("/")
        leaf = jnp.asarray(0.02 * rng.standard_normal(shape, np.float32), dtype)
        (params[folder] if folder else params)[name] = leaf
    decoder = Decoder(spec, param_dtype=dtype, compute_dtype=dtype)
    programs, results = {}, {}
    for name, (function, arguments) in ways(decoder, rng).items():
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
    app.run(main)
