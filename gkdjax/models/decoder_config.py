"""The numbers that tell one decoder family from another, and the parameters they imply."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's frequencies: the slow ones divided by `factor`, the fast ones as they are.

    Slow turns less than `low_freq_factor` times within `original_length` positions, fast more than
    `high_freq_factor` times; in between the two are mixed, linearly in the number of turns.
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
    """Everything `models.decoder.Decoder` needs to know of a family; hashable, so it can be static.

    Attributes:
      family: name of the module in `gkdjax.models` that knows its checkpoints.
      vocab_size: V, rows of the embedding, padding rows of the checkpoint included.
      width: D, hidden size.
      num_heads: H query heads, `num_kv_heads` G key/value heads, `head_dim` C channels each.
      ffn_width: F, inner width of the gated MLP.
      query_scale: factor on q·k.
      activation: "gelu_tanh" or "silu", on the gate of the MLP.
      tied_embedding: the unembedding is the embedding.
      is_global_L: per layer: full causal attention (True) or the last `window` positions (False).
      norm_offset: added to the RMSNorm scale (Gemma stores scale - 1).
      embedding_scale: factor on the token embeddings, rounded to their dtype before use.
      qkv_bias: queries, keys and values have a bias.
      qk_norm: RMSNorm on queries and keys, per head, before the rotation.
      post_norms: a second RMSNorm after attention and after the MLP, before the residual sum.
      window: key j is seen from i iff i - window < j <= i, in local layers; None without any.
      rope_local: None without local layers.
      final_softcap: c in c * tanh(logits / c), or None.
      context_length: tokens that the model was made to read at most; None: nobody says.
    """

    family: str
    vocab_size: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    norm_eps: float
    query_scale: float
    activation: str
    tied_embedding: bool
    is_global_L: tuple[bool, ...]
    rope_global: RopeSpec
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    window: int | None = None
    rope_local: RopeSpec | None = None
    final_softcap: float | None = None
    context_length: int | None = None

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
    shapes = {"embedding": (spec.vocab_size, spec.width), "final_norm": (spec.width,)}
    if not spec.tied_embedding:
        shapes["unembedding"] = (spec.vocab_size, spec.width)
    return shapes | {f"layers/{name}": shape for name, shape in layer_shapes(spec).items()}
