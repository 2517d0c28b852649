"""The numbers that describe a decoder of any family, and the shapes of its parameters."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1 divides slow frequencies by `factor` and leaves fast ones as they are.

    Slow: fewer than `low_freq_factor` turns within `original_length` positions; fast: more than
    `high_freq_factor`; in between the two are mixed, linearly in the number of turns.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding: base `theta`; positions are divided by `linear_factor`."""

    theta: float
    linear_factor: float = 1.0
    llama3: Llama3Scaling | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Describes a decoder; hashable, so that it can be a static argument."""

    family: str  # its module in `gkdjax.models.families`
    vocab_size: int  # V, rows of the embedding, padding rows of the checkpoint included
    width: int  # D
    num_heads: int  # H, of queries
    num_kv_heads: int  # G
    head_dim: int  # C
    ffn_width: int  # F, inner width of the gated MLP
    norm_eps: float
    query_scale: float  # factor on q·k
    activation: str  # of the MLP's gate: "gelu_tanh" or "silu"
    tied_embedding: bool  # the unembedding is the embedding
    is_global_L: tuple[bool, ...]  # full causal attention, or only the last `window` positions
    rope_global: RopeSpec
    norm_offset: float = 0.0  # added to the scale of an RMSNorm (Gemma stores scale - 1)
    embedding_scale: float = 1.0  # factor on token embeddings, rounded to their dtype before use
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of queries and keys, per head, before the rotation
    post_norms: bool = False  # RMSNorm after attention and after the MLP, before the residual sum
    window: int | None = None  # in local layers, i sees key j if i - window < j <= i
    rope_local: RopeSpec | None = None  # None without local layers
    final_softcap: float | None = None  # c in c * tanh(logits / c)
    context_length: int | None = None  # most tokens that the model was made to read, if known

    @property
    def num_layers(self) -> int:
        return len(self.is_global_L)


def layer_shapes(spec: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every stacked layer parameter; kernels (L, in, out), all else (L, size)."""
    L, D, F, C = spec.num_layers, spec.width, spec.ffn_width, spec.head_dim
    H, G = spec.num_heads, spec.num_kv_heads
    shapes = {
        "attn_norm": (L, D),
        "q_proj": (L, D, H * C),
        "k_proj": (L, D, G * C),
        "v_proj": (L, D, G * C),
        "o_proj": (L, H * C, D),
        "mlp_norm": (L, D),
        "gate_proj": (L, D, F),
        "up_proj": (L, D, F),
        "down_proj": (L, F, D),
    }
    if spec.qkv_bias:
        shapes |= {"q_bias": (L, H * C), "k_bias": (L, G * C), "v_bias": (L, G * C)}
    if spec.qk_norm:
        shapes |= {"q_norm": (L, C), "k_norm": (L, C)}
    if spec.post_norms:
        shapes |= {"attn_post_norm": (L, D), "mlp_post_norm": (L, D)}
    return shapes


def param_shapes(spec: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of the decoder, paths as in `gkdjax.utils.tree`."""
    table = (spec.vocab_size, spec.width)
    shapes = {"embedding": table, "final_norm": (spec.width,)}
    if not spec.tied_embedding:
        shapes["unembedding"] = table
    return shapes | {f"layers/{name}": shape for name, shape in layer_shapes(spec).items()}
