"""Llama 3: HF config -> DecoderSpec, and where each tensor of a checkpoint goes."""

from transformers import LlamaConfig

from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.families.common import KEYS as COMMON_KEYS
from gkdjax.models.families.common import SILU, CheckpointNames, one_rope, refuse, sizes

CONFIGS = {"llama": (LlamaConfig,)}
KEYS = COMMON_KEYS | {"attention_bias", "mlp_bias", "hidden_act"}
LAYOUTS = {"llama": (CheckpointNames(),)}

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
    """The spec of a config.json, old or new form: transformers' own class fills in and converts.

    Raises:
      ValueError: the config asks for something that this decoder does not compute.
    """
    c = LlamaConfig.from_dict(config)
    refuse("Llama", c.attention_bias, "attention_bias=true")
    refuse("Llama", c.mlp_bias, "mlp_bias=true")
    refuse("Llama", c.hidden_act not in SILU, f"activation {c.hidden_act!r}")
    rope = one_rope("Llama", c)
    return DecoderConfig(
        family="llama",
        **sizes(c),
        head_dim=c.head_dim,
        query_scale=c.head_dim**-0.5,
        activation="silu",
        tied_embedding=c.tie_word_embeddings,
        is_global_L=(True,) * c.num_hidden_layers,
        rope_global=rope,
    )
