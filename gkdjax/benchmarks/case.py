"""What one worker of the step benchmark measures, and the models it does it with. Imports no jax.

Model shapes are Gemma 3's in kind: one key head, five local layers to a global one, norms on both
sides, a tied embedding.
"""

import dataclasses
import typing

from gkdjax.models.decoder_config import DecoderConfig, RopeSpec

UNFUSED = "unfused"  # what the others are compared with
VARIANTS = (UNFUSED, "dense", "topk", "stored")  # measured by default
PLAIN = "plain"
TUNINGS = ("lora", "full")
PROMPTS = ("none", "half")


class Shape(typing.NamedTuple):
    """The numbers in which the benchmark's models differ."""

    width: int
    layers: int
    num_heads: int
    head_dim: int
    ffn_width: int


STUDENTS = {
    "tiny": Shape(16, 2, 2, 8, 32),
    "small": Shape(256, 6, 4, 64, 1024),
    "gemma3": Shape(640, 18, 4, 256, 2048),  # Gemma 3 270M
}
TEACHERS = {
    "tiny": Shape(24, 2, 2, 8, 48),
    "small": Shape(512, 12, 8, 64, 2048),
    "gemma3": Shape(1152, 26, 4, 256, 6912),  # Gemma 3 1B
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One worker's measurement.

    Attributes:
      vocab: V of both models.
      tuning: "lora" (rank 64, all kernels, base frozen) or "full".
      prompts: "none": each position predicts a target; "half": only the second half does.
      variant: of VARIANTS or PLAIN; see `gkdjax.benchmarks.steps`.
      rows: of the batch.
      length: positions of a row.
      top_k: of "topk" and "stored".
      student: of STUDENTS.
      teacher: of TEACHERS.
      dtype: of frozen weights and matrix products: float32 or bfloat16.
      chunk_size: the config's `gkd.chunk_size`.
      steps: timed ones, after one that is not.
    """

    vocab: int
    tuning: str
    prompts: str
    variant: str
    rows: int
    length: int
    top_k: int
    student: str
    teacher: str
    dtype: str
    chunk_size: int
    steps: int

    @property
    def tokens(self) -> int:
        """Student tokens of a step, prompts included."""
        return self.rows * self.length


def decoder_spec(shape: Shape, vocab_size: int) -> DecoderConfig:
    return DecoderConfig(
        family="gemma3",
        vocab_size=vocab_size,
        width=shape.width,
        num_heads=shape.num_heads,
        num_kv_heads=1,
        head_dim=shape.head_dim,
        ffn_width=shape.ffn_width,
        norm_eps=1e-6,
        norm_offset=1.0,
        embedding_scale=shape.width**0.5,
        query_scale=shape.head_dim**-0.5,
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        tied_embedding=True,
        is_global_L=tuple(layer % 6 == 5 for layer in range(shape.layers)),
        window=512,
        rope_global=RopeSpec(1e6),
        rope_local=RopeSpec(1e4),
        final_softcap=None,
    )
