"""The cost of a prefix that all rows share: read by each row, read once, or cached from before.

    python -m gkdjax.benchmarks.shared_prefix [--prefix 512 2048 8192 --ways cached reading]

Hidden states of rows x length tokens after a prefix, without the head. Ratios are of the same
round's first way or, of several prefixes, first prefix. "work beside" and "attention" are XLA's
count of a layer's floating-point operations, and what of it is attention to the prefix.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gkdjax.benchmarks import harness
from gkdjax.benchmarks.models import TEACHERS, decoder_spec, random_model
from gkdjax.models.decoder import Decoder, read_prefix
from gkdjax.utils.text import table

VOCAB = 1024  # only rows of the embedding are read
WAYS = ("each row", "once", "cached", "reading")


def main() -> None:
    parser = argparse.ArgumentParser("shared_prefix", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=TEACHERS, default="small", help="Of the model.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prefix", type=int, nargs="+", default=[2048], help="Tokens of each.")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="Of reading it.")
    parser.add_argument("--rows", type=int, default=8, help="Of the batch.")
    parser.add_argument("--length", type=int, default=128, help="Tokens of a row after the prefix.")
    parser.add_argument("--rounds", type=int, default=5, help="Timed, after one that is not.")
    a = parser.parse_args()
    decoder, params = random_model(decoder_spec(TEACHERS[a.shape], VOCAB), a.dtype)
    programs, cases = {}, {}
    for P in a.prefix:
        for way, (function, arguments) in ways(decoder, params, a.rows, P, a.length).items():
            if way in a.ways:
                programs[P, way] = compiled = function.lower(params, *arguments).compile()
                run = functools.partial(compiled, params, *arguments)
                jax.block_until_ready(run())
                cases[P, way] = functools.partial(harness.timed, run)
    results = harness.rounds(cases, a.rounds)
    rows = []
    for (P, way), found in results.items():
        first = results[(P, a.ways[0]) if len(a.prefix) == 1 else (a.prefix[0], way)]
        numbers = harness.median(found), harness.median(found, over=first)
        attention = attention_flops(decoder, a.rows, P, a.length)
        beside = programs[P, way].cost_analysis()["flops"] - attention
        work = [f"{n / 1e9:.2f}" if way == "cached" else "-" for n in (beside, attention)]
        scratch = programs[P, way].memory_analysis().temp_size_in_bytes / harness.GIB
        rows.append([f"{P:,}", way, *(f"{n:.3f}" for n in numbers), *work, f"{scratch:.2f}"])
    header = ["prefix", "read", "s", "times the first", "GFLOP a layer, beside"]
    print(table([*header, "attention to the prefix", "scratch, GiB"], rows, left=2))


def ways(decoder: Decoder, params: dict, B: int, P: int, T: int) -> dict:
    """Name of `WAYS` -> (jitted function of the parameters and more, that more).

    All but "reading", which reads the prefix alone, have the same result.
    """
    rng = np.random.default_rng(P)
    prefix_1P = rng.integers(0, VOCAB, (1, P)).astype(np.int32)
    tokens_BT = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
    whole = np.concatenate([np.broadcast_to(prefix_1P, (B, P)), tokens_BT], axis=1)

    def after(params, prefix, tokens):
        return decoder.apply({"params": params}, tokens, jnp.ones(tokens.shape, bool), prefix)

    def each_row(params, tokens):
        return after(params, None, tokens)[:, P:]

    def read(params, tokens):
        return read_prefix(decoder, params, tokens, jnp.ones(tokens.shape, bool))

    def once(params, prefix_tokens, tokens):
        return after(params, read(params, prefix_tokens), tokens)

    cached = jax.jit(read)(params, prefix_1P)
    functions = map(jax.jit, (each_row, once, after, read))
    arguments = (whole,), (prefix_1P, tokens_BT), (cached, tokens_BT), (prefix_1P,)
    return dict(zip(WAYS, zip(functions, jax.device_put(arguments), strict=True), strict=True))


def attention_flops(decoder: Decoder, B: int, P: int, T: int) -> float:
    """Floating-point operations of a batch's attention to a cached prefix in one layer.

    XLA counts the body of the scan over the layers once, and of a branch the dearer side: so it is
    a global layer if there is any.
    """
    spec = decoder.spec
    keys = P if any(spec.is_global_L) else min(P, spec.window)
    # Scores and the sum of values: two products of [T, C] and [C, P] for each head and row; and of
    # each score scaling, masking and what softmax does, about eight.
    return float(B * spec.num_heads * T * keys * (4 * spec.head_dim + 8))


if __name__ == "__main__":
    main()
