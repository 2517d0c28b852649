"""Qwen 2 and 2.5, dense: HF config -> DecoderConfig, and where each tensor goes."""

from transformers import Qwen2Config

from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.families import common, llama

CONFIGS = {"qwen2": (Qwen2Config,)}
KEYS = common.KEYS | {
    *("hidden_act", "layer_types"),
    *("use_sliding_window", "sliding_window", "max_window_layers"),
}
LAYOUTS = {"qwen2": (common.CheckpointNames(),)}
TENSORS = llama.TENSORS | {
    "layers/q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/v_bias": "model.layers.{}.self_attn.v_proj.bias",
}


def decoder_spec(config: dict) -> DecoderConfig:
    c = Qwen2Config.from_dict(config)
    own = {"family": "qwen2", "qkv_bias": True}
    return common.silu_spec("Qwen 2", c, c.layer_types, c.sliding_window, **own)
