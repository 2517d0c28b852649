"""Gemma 3 (text decoder): HF config -> DecoderSpec, and where each tensor of a checkpoint goes."""

from transformers import Gemma3Config, Gemma3TextConfig

from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.families import llama
from gkdjax.models.families.common import KEYS as COMMON_KEYS
from gkdjax.models.families.common import CheckpointNames, global_layers, refuse, rope_spec, sizes

CONFIGS = {"gemma3_text": (Gemma3TextConfig,), "gemma3": (Gemma3Config, Gemma3TextConfig)}
KEYS = COMMON_KEYS | {
    *("attention_bias", "use_bidirectional_attention", "hidden_activation", "layer_types"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
    *("sliding_window", "sliding_window_pattern", "rope_local_base_freq"),
}

# 4B and up are multimodal: an image encoder stands beside the text decoder. Their files have
# mostly the first layout; the second has the names of the modules in torch.
LAYOUTS = {
    "gemma3_text": (CheckpointNames(),),
    "gemma3": (
        CheckpointNames(
            "language_model.model.",
            "language_model.lm_head.",
            foreign=("vision_tower.", "multi_modal_projector."),
        ),
        CheckpointNames(
            "model.language_model.",
            "lm_head.",
            foreign=("model.vision_tower.", "model.multi_modal_projector."),
        ),
    ),
}

TENSORS = llama.TENSORS | {
    "layers/q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers/k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers/attn_post_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}


def decoder_spec(config: dict) -> DecoderConfig:
    """The spec of a config.json, old or new form: transformers' own class fills in and converts.

    Raises:
      ValueError: the config asks for something that this decoder does not compute.
    """
    if config["model_type"] == "gemma3":
        whole = Gemma3Config.from_dict(config)
        c, tied = whole.text_config, whole.tie_word_embeddings
    else:
        c = Gemma3TextConfig.from_dict(config)
        tied = c.tie_word_embeddings
    refuse("Gemma 3", c.attention_bias, "attention_bias=true")
    refuse("Gemma 3", c.use_bidirectional_attention, "use_bidirectional_attention=true")
    cap = c.attn_logit_softcapping
    refuse("Gemma 3", cap is not None, f"attn_logit_softcapping={cap}")
    other = c.hidden_activation != "gelu_pytorch_tanh"
    refuse("Gemma 3", other, f"activation {c.hidden_activation!r}")
    return DecoderConfig(
        family="gemma3",
        **sizes(c),
        head_dim=c.head_dim,
        norm_offset=1.0,
        embedding_scale=c.hidden_size**0.5,
        query_scale=c.query_pre_attn_scalar**-0.5,
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        tied_embedding=tied,
        is_global_L=global_layers("Gemma 3", c.layer_types),
        window=c.sliding_window,
        rope_global=rope_spec("Gemma 3", c.rope_parameters["full_attention"]),
        rope_local=rope_spec("Gemma 3", c.rope_parameters["sliding_attention"]),
        final_softcap=c.final_logit_softcapping,
    )
