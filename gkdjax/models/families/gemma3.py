"""Gemma 3 (text decoder): HF config -> DecoderConfig, and where each tensor goes."""

from transformers import Gemma3Config, Gemma3TextConfig

from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.families import common, llama

CONFIGS = {"gemma3_text": (Gemma3TextConfig,), "gemma3": (Gemma3Config, Gemma3TextConfig)}
KEYS = common.KEYS | {
    *("attention_bias", "use_bidirectional_attention", "hidden_activation", "layer_types"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
    *("sliding_window", "sliding_window_pattern", "rope_local_base_freq"),
}

# 4B and up are multimodal: an image encoder stands beside the text decoder. Their files have
# mostly the first layout; the second has the names of the modules in torch.
LAYOUTS = {
    "gemma3_text": (common.CheckpointNames(),),
    "gemma3": (
        common.CheckpointNames(
            "language_model.model.",
            "language_model.lm_head.",
            foreign=("vision_tower.", "multi_modal_projector."),
        ),
        common.CheckpointNames(
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
    whole = CONFIGS[config["model_type"]][0].from_dict(config)
    c = whole.get_text_config()
    for name in ("attention_bias", "use_bidirectional_attention"):
        common.refuse("Gemma 3", getattr(c, name), f"{name}=true")
    cap = c.attn_logit_softcapping
    common.refuse("Gemma 3", cap is not None, f"attn_logit_softcapping={cap}")
    other = c.hidden_activation != "gelu_pytorch_tanh"
    common.refuse("Gemma 3", other, f"hidden_activation={c.hidden_activation!r}")
    return DecoderConfig(
        family="gemma3",
        **common.sizes(c),
        norm_offset=1.0,
        embedding_scale=c.hidden_size**0.5,
        query_scale=c.query_pre_attn_scalar**-0.5,
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        tied_embedding=whole.tie_word_embeddings,
        is_global_L=common.global_layers("Gemma 3", c.layer_types),
        window=c.sliding_window,
        rope_global=common.rope_spec("Gemma 3", c.rope_parameters["full_attention"]),
        rope_local=common.rope_spec("Gemma 3", c.rope_parameters["sliding_attention"]),
        final_softcap=c.final_logit_softcapping,
    )
