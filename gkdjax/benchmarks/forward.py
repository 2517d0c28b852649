"""A forward pass of a whole model of random weights: tokens/s, and what share of the peak that is.

    python -m gkdjax.benchmarks.forward --model=gemma3-1b --peak_tflops=989

Hidden states of rows x length tokens, without the head. Floating-point operations are counted as
two for each weight of a kernel and token, and for each query and key that see each other; what a
mask throws away is not counted.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gkdjax.models.decoder import Decoder
from gkdjax.models.decoder_config import DecoderConfig, layer_shapes, param_shapes
from gkdjax.models.families import registry
from gkdjax.utils.text import table

# config.json of the published models, as far as the decoder's numbers go.
MODELS = {
    "tiny": {
        "model_type": "qwen3",
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
    },
    "gemma3-1b": {
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 1152,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 6912,
        "sliding_window": 512,
        "query_pre_attn_scalar": 256,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "tie_word_embeddings": True,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser("forward", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="tiny", help="Whose shapes.")
    parser.add_argument("--rows", type=int, default=8, help="Of the batch.")
    parser.add_argument("--length", type=int, default=1024, help="Tokens of a row.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=10, help="Timed, after one that is not.")
    parser.add_argument("--peak_tflops", type=float, help="Of the device, to give the share of it.")
    a = parser.parse_args()
    spec = decoder_spec(a.model)
    seconds = measure(spec, a.rows, a.length, jnp.dtype(a.dtype), a.steps)
    teraflops = flops(spec, a.rows, a.length) / seconds / 1e12
    share = "-" if a.peak_tflops is None else f"{teraflops / a.peak_tflops:.1%}"
    device = jax.devices()[0].device_kind
    head = ["model", "device", "rows x length", "s", "tokens/s", "TFLOP/s", "of the peak"]
    cells = [f"{a.rows} x {a.length}", f"{seconds:.4f}", f"{a.rows * a.length / seconds:,.0f}"]
    print(table(head, [[a.model, device, *cells, f"{teraflops:.3g}", share]]))


def decoder_spec(model: str) -> DecoderConfig:
    config = MODELS[model]
    return registry.MODEL_TYPES[config["model_type"]].decoder_spec(config)


def flops(spec: DecoderConfig, rows: int, length: int) -> int:
    """Of one forward pass without the head."""
    kernels = sum(
        int(np.prod(shape)) for name, shape in layer_shapes(spec).items() if name.endswith("_proj")
    )
    pairs = 0
    for is_global in spec.is_global_L:
        seen = length if is_global else min(spec.window, length)
        pairs += seen * (seen + 1) // 2 + (length - seen) * seen
    scores_and_sums = 2 * 2 * spec.num_heads * spec.head_dim * pairs
    return rows * (2 * kernels * length + scores_and_sums)


def measure(spec: DecoderConfig, rows: int, length: int, dtype: jnp.dtype, steps: int) -> float:
    """Median seconds of `steps` forward passes."""
    decoder = Decoder(spec, param_dtype=dtype, compute_dtype=dtype)
    leaves = {
        path: 0.02 * jax.random.normal(jax.random.key(number), shape, dtype)
        for number, (path, shape) in enumerate(param_shapes(spec).items())
    }
    params = traverse_util.unflatten_dict(leaves, sep="/")
    tokens_BT = jnp.asarray(
        np.random.default_rng(0).integers(0, spec.vocab_size, (rows, length)), jnp.int32
    )

    @jax.jit
    def forward(params, tokens_BT):
        return decoder.apply({"params": params}, tokens_BT, jnp.ones(tokens_BT.shape, bool))

    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        forward(params, tokens_BT).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
