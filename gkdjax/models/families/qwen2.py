"""Qwen 2 and 2.5, dense: HF config -> DecoderSpec, and where each tensor of a checkpoint goes."""

from transformers import Qwen2Config

from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.families import llama
from gkdjax.models.families.common import KEYS as COMMON_KEYS
from gkdjax.models.families.common import (
    SILU,
    CheckpointNames,
    global_layers,
    one_rope,
    refuse,
    sizes,
)

CONFIGS = {"qwen2": (Qwen2Config,)}
KEYS = COMMON_KEYS | {
    *("hidden_act", "layer_types"),
    *("use_sliding_window", "sliding_window", "max_window_layers"),
}
LAYOUTS = {"qwen2": (CheckpointNames(),)}

TENSORS = llama.TENSORS | {
    "layers/q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/v_bias": "model.layers.{}.self_attn.v_proj.bias",
}


def decoder_spec(config: dict) -> DecoderConfig:
    """The spec of a config.json, old or new form: transformers' own class fills in and converts.

    Raises:
      ValueError: the config asks for something that this decoder does not compute.
    """
    c = Qwen2Config.from_dict(config)
    refuse("Qwen 2", c.hidden_act not in SILU, f"activation {c.hidden_act!r}")
    rope = one_rope("Qwen 2", c)
    # No field of the class, but transformers' model takes it where a config.json has it.
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return DecoderConfig(
        family="qwen2",
        **sizes(c),
        head_dim=head_dim,
        query_scale=head_dim**-0.5,
        activation="silu",
        qkv_bias=True,
        tied_embedding=c.tie_word_embeddings,
        is_global_L=global_layers("Qwen 2", c.layer_types),
        window=c.sliding_window,
        rope_global=rope,
        rope_local=rope,
    )
