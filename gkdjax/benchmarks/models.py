"""The benchmarks' models and batches: random, or shapes alone.

The models are of Gemma 3's kind: one key head, five local layers to a global one, norms on both
sides, a tied embedding.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gkdjax.models.decoder import Decoder
from gkdjax.models.decoder_config import DecoderConfig, RopeSpec, param_shapes
from gkdjax.types import Batch

# Width, layers, heads, their size, width of the MLP.
STUDENTS = {
    "tiny": (16, 2, 2, 8, 32),
    "small": (256, 6, 4, 64, 1024),
    "gemma3": (640, 18, 4, 256, 2048),  # Gemma 3 270M
}
TEACHERS = {
    "tiny": (24, 2, 2, 8, 48),
    "small": (512, 12, 8, 64, 2048),
    "gemma3": (1152, 26, 4, 256, 6912),  # Gemma 3 1B
}


def decoder_spec(shape: tuple[int, ...], vocab_size: int) -> DecoderConfig:
    width, layers, num_heads, head_dim, ffn_width = shape
    return DecoderConfig(
        family="gemma3",
        vocab_size=vocab_size,
        width=width,
        num_heads=num_heads,
        num_kv_heads=1,
        head_dim=head_dim,
        ffn_width=ffn_width,
        norm_eps=1e-6,
        norm_offset=1.0,
        embedding_scale=width**0.5,
        query_scale=head_dim**-0.5,
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        tied_embedding=True,
        is_global_L=tuple(layer % 6 == 5 for layer in range(layers)),
        window=512,
        rope_global=RopeSpec(1e6),
        rope_local=RopeSpec(1e4),
    )


def random_model(spec: DecoderConfig, dtype: str, seed: int = 0) -> tuple[Decoder, dict]:
    """Random weights at a scale where logits have a standard deviation of about 1."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, size in param_shapes(spec).items():
        fan_in = size[-2] if path.startswith("layers/") else size[-1]
        std = 0.0 if path.endswith("norm") else fan_in**-0.5
        leaf = rng.standard_normal(size, np.float32)
        leaf *= np.float32(std)
        leaves[path] = jnp.asarray(leaf, dtype)
    decoder = Decoder(spec, param_dtype=jnp.dtype(dtype), compute_dtype=jnp.dtype(dtype))
    return decoder, traverse_util.unflatten_dict(leaves, sep="/")


def random_batch(seed: int, vocab: int, rows: int, length: int, prompt: int, end: int) -> Batch:
    """Random tokens that both models read; each position from `prompt` to `end` predicts one."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (rows, length + 1)).astype(np.int32)
    at_BN = np.broadcast_to(np.arange(prompt, end, dtype=np.int32), (rows, end - prompt))
    read = tokens[:, :-1], np.ones((rows, length), bool), at_BN
    targets = tokens[:, prompt + 1 : end + 1]
    row_id_B = np.arange(rows, dtype=np.int32)
    return Batch(*read, *read, targets, np.ones(targets.shape, bool), row_id_B)


def abstract_batch(rows: int, student: int, teacher: int, targets: int) -> Batch:
    """A batch of shapes: positions of the student's and the teacher's rows, targets of a row."""

    def array(length, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((rows, length), dtype)

    views = ((array(n), array(n, bool), array(targets)) for n in (student, teacher))
    row_id_B = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return Batch(*next(views), *next(views), array(targets), array(targets, bool), row_id_B)
