"""How the cost of a batch grows with the prefix before it, which was read once and kept.

    JAX_PLATFORMS=cpu python -m gkdjax.benchmarks.prefix_length

Hidden states of rows x length tokens after a prefix, without the head; and reading the prefix,
which happens once in a run. Each round times every length once, one after the other; ratios are of
the same round's first length. The work of a layer is XLA's count of floating-point operations.
"""

import argparse
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from gkdjax.benchmarks.case import TEACHERS
from gkdjax.benchmarks.shared_prefix import VOCAB, measure, model
from gkdjax.models.decoder import Decoder, read_prefix
from gkdjax.utils.text import table


def main() -> None:
    parser = argparse.ArgumentParser("prefix_length", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=TEACHERS, default="small", help="Of the model.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--prefix", type=int, nargs="+", default=[512, 2048, 8192], help="Tokens of each prefix."
    )
    parser.add_argument("--rows", type=int, default=8, help="Of the batch.")
    parser.add_argument("--length", type=int, default=128, help="Tokens of a row after the prefix.")
    parser.add_argument("--rounds", type=int, default=5, help="Timed, after one that is not.")
    a = parser.parse_args()
    decoder, params = model(TEACHERS[a.shape], jnp.dtype(a.dtype))
    ways = {P: after_a_prefix(decoder, a.rows, P, a.length) for P in a.prefix}
    ways |= {("read", P): reading(decoder, P) for P in a.prefix}
    measured = measure(params, ways, a.rounds)
    first, _ = measured[a.prefix[0]]
    rows = []
    for P in a.prefix:
        (seconds, temp_bytes), (read, _) = measured[P], measured["read", P]
        ratios = [each / own for each, own in zip(seconds, first, strict=True)]
        total, attention = operations(decoder, params, ways[P], a.rows, P, a.length)
        rows.append(
            [
                f"{P:,}",
                f"{statistics.median(seconds):.3f}",
                f"{statistics.median(ratios):.2f}",
                f"{(total - attention) / 1e9:.2f}",
                f"{attention / 1e9:.2f}",
                f"{temp_bytes / 2**30:.2f}",
                f"{statistics.median(read):.2f}",
            ]
        )
    header = ["prefix", "s a batch", "times the first", "GFLOP a layer, beside"]
    header += ["attention to the prefix", "scratch, GiB", "s to read it, once"]
    print(table(header, rows))


def after_a_prefix(decoder: Decoder, B: int, P: int, T: int):
    """(function of the parameters and more, what makes that): a batch behind a kept prefix."""
    tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (B, T)).astype(np.int32)

    @jax.jit
    def run(params, prefix, tokens):
        return decoder.apply({"params": params}, tokens, jnp.ones(tokens.shape, bool), prefix)

    read, tokens_1P = reading(decoder, P)
    return run, lambda params: (read(params, *tokens_1P(params)), tokens_BT)


def reading(decoder: Decoder, P: int):
    """The same of reading the prefix itself."""
    tokens_1P = np.random.default_rng(P).integers(0, VOCAB, (1, P)).astype(np.int32)
    read = functools.partial(read_prefix, decoder)
    run = jax.jit(lambda params, tokens: read(params, tokens, jnp.ones(tokens.shape, bool)))
    return run, lambda params: (tokens_1P,)


def operations(decoder: Decoder, params: dict, way, B: int, P: int, T: int) -> tuple[float, float]:
    """Floating-point operations of a batch -> (all, those of attention to the prefix).

    XLA counts the body of the scan over the layers once, and of a branch the dearer side: so both
    are of one layer, a global one if there is any.
    """
    function, arguments = way
    others = jax.tree.map(jnp.asarray, arguments(params))
    counted = function.lower(params, *others).compile().cost_analysis()["flops"]
    spec = decoder.spec
    keys = P if any(spec.is_global_L) else min(P, spec.window)
    # Scores and the sum of values: two products of [T, C] and [C, P] for each head and row; and of
    # each score scaling, masking and what softmax does, about eight.
    per_score = 4 * spec.head_dim + 8
    return counted, float(B * spec.num_heads * T * keys * per_score)


if __name__ == "__main__":
    main()
