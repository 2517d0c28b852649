"""Llama 3: HF config -> DecoderConfig, and where each tensor of a checkpoint goes."""

from transformers import LlamaConfig

from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.families import common

CONFIGS = {"llama": (LlamaConfig,)}
KEYS = common.KEYS | {"attention_bias", "mlp_bias", "hidden_act"}
LAYOUTS = {"llama": (common.CheckpointNames(),)}

# Leaf path -> HF tensor name ({} is the layer) of the leaf; kernels are stored (out, in) there.
TENSORS = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "unembedding": "lm_head.weight",
    "layers/attn_norm": "model.layers.{}.input_layernorm.weight",
    "layers/q_proj": "model.layers.{}.self_attn.q_proj.weight",
    "layers/k_proj": "model.layers.{}.self_attn.k_proj.weight",
    "layers/v_proj": "model.layers.{}.self_attn.v_proj.weight",
    "layers/o_proj": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate_proj": "model.layers.{}.mlp.gate_proj.weight",
    "layers/up_proj": "model.layers.{}.mlp.up_proj.weight",
    "layers/down_proj": "model.layers.{}.mlp.down_proj.weight",
}


def decoder_spec(config: dict) -> DecoderConfig:
    c = LlamaConfig.from_dict(config)
    common.refuse("Llama", c.attention_bias, "attention_bias=true")
    common.refuse("Llama", c.mlp_bias, "mlp_bias=true")
    return common.silu_spec("Llama", c, ["full_attention"] * c.num_hidden_layers, family="llama")
