"""A forward pass of a whole model of random weights: tokens/s, and what share of the peak that is.

    python -m gkdjax.benchmarks.forward --model=gemma3-1b --peak_tflops=989

Hidden states of rows x length tokens, without the head. Floating-point operations are counted as
two for each weight of a kernel and token, and for each query and key that see each other; what a
mask throws away is not counted.
"""

import argparse
import math

import jax
import jax.numpy as jnp

from gkdjax.benchmarks import harness
from gkdjax.benchmarks.models import TEACHERS, random_batch, random_model
from gkdjax.benchmarks.models import decoder_spec as gemma_spec
from gkdjax.models.decoder_config import DecoderConfig, RopeSpec, layer_shapes
from gkdjax.utils.text import table

QWEN3_4B = DecoderConfig(
    family="qwen3",
    vocab_size=151_936,
    width=2560,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_width=9728,
    norm_eps=1e-6,
    query_scale=128**-0.5,
    activation="silu",
    qk_norm=True,
    tied_embedding=True,
    is_global_L=(True,) * 36,
    rope_global=RopeSpec(1e6),
)
MODELS = {
    "tiny": gemma_spec(TEACHERS["tiny"], 64),
    "gemma3-1b": gemma_spec(TEACHERS["gemma3"], 262_144),
    "qwen3-4b": QWEN3_4B,
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
    spec = MODELS[a.model]
    decoder, params = random_model(spec, a.dtype)
    tokens_BT = random_batch(0, spec.vocab_size, a.rows, a.length, 0, 1).student_tokens_BS

    @jax.jit
    def forward(params, tokens_BT):
        return decoder.apply({"params": params}, tokens_BT, jnp.ones(tokens_BT.shape, bool))

    def run():
        return forward(params, tokens_BT)

    harness.timed(run)
    seconds = harness.timed(run, a.steps)["seconds"]
    teraflops = flops(spec, a.rows, a.length) / seconds / 1e12
    share = "-" if a.peak_tflops is None else f"{teraflops / a.peak_tflops:.1%}"
    head = ["model", "device", "rows x length", "s", "tokens/s", "TFLOP/s", "of the peak"]
    cells = [f"{a.rows} x {a.length}", f"{seconds:.4f}", f"{a.rows * a.length / seconds:,.0f}"]
    device = jax.devices()[0].device_kind
    print(table(head, [[a.model, device, *cells, f"{teraflops:.3g}", share]]))


def flops(spec: DecoderConfig, rows: int, length: int) -> int:
    """Floating-point operations of one forward pass without the head."""
    shapes = layer_shapes(spec).items()
    kernels = sum(math.prod(shape) for name, shape in shapes if name.endswith("_proj"))
    pairs = 0
    for is_global in spec.is_global_L:
        seen = length if is_global else min(spec.window, length)
        pairs += seen * (seen + 1) // 2 + (length - seen) * seen
    return rows * (2 * kernels * length + 2 * 2 * spec.num_heads * spec.head_dim * pairs)


if __name__ == "__main__":
    main()
