"""Qwen 3, dense: HF config -> DecoderConfig, and where each tensor of a checkpoint goes."""

from transformers import Qwen3Config

from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.families import common, llama

CONFIGS = {"qwen3": (Qwen3Config,)}
KEYS = common.KEYS | {
    *("attention_bias", "hidden_act", "layer_types"),
    *("use_sliding_window", "sliding_window", "max_window_layers"),
}
LAYOUTS = {"qwen3": (common.CheckpointNames(),)}
TENSORS = llama.TENSORS | {
    "layers/q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers/k_norm": "model.layers.{}.self_attn.k_norm.weight",
}


def decoder_spec(config: dict) -> DecoderConfig:
    c = Qwen3Config.from_dict(config)
    common.refuse("Qwen 3", c.attention_bias, "attention_bias=true")
    own = {"family": "qwen3", "qk_norm": True}
    return common.silu_spec("Qwen 3", c, c.layer_types, c.sliding_window, **own)
