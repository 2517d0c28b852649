"""Qwen 3, dense: HF config -> DecoderSpec, and where each tensor of a checkpoint goes."""

from transformers import Qwen3Config

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

CONFIGS = {"qwen3": (Qwen3Config,)}
KEYS = COMMON_KEYS | {
    *("attention_bias", "hidden_act", "layer_types"),
    *("use_sliding_window", "sliding_window", "max_window_layers"),
}
LAYOUTS = {"qwen3": (CheckpointNames(),)}

TENSORS = llama.TENSORS | {
    "layers/q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers/k_norm": "model.layers.{}.self_attn.k_norm.weight",
}


def decoder_spec(config: dict) -> DecoderConfig:
    """The spec of a config.json, old or new form: transformers' own class fills in and converts.

    Raises:
      ValueError: the config asks for something that this decoder does not compute.
    """
    c = Qwen3Config.from_dict(config)
    refuse("Qwen 3", c.attention_bias, "attention_bias=true")
    refuse("Qwen 3", c.hidden_act not in SILU, f"activation {c.hidden_act!r}")
    rope = one_rope("Qwen 3", c)
    return DecoderConfig(
        family="qwen3",
        **sizes(c),
        head_dim=c.head_dim,
        query_scale=c.head_dim**-0.5,
        activation="silu",
        qk_norm=True,
        tied_embedding=c.tie_word_embeddings,
        is_global_L=global_layers("Qwen 3", c.layer_types),
        window=c.sliding_window,
        rope_global=rope,
        rope_local=rope,
    )
