"""Gemma 3 (text): HF config -> DecoderSpec, and where each tensor of a checkpoint goes."""

from transformers import Gemma3TextConfig

from gkdjax.models.spec import DecoderSpec, RopeSpec

MODEL_TYPE = "gemma3_text"
_LAYER_KINDS = ("full_attention", "sliding_attention")

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
    "layers/q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers/k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers/attn_post_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/gate_proj": "model.layers.{}.mlp.gate_proj.weight",
    "layers/up_proj": "model.layers.{}.mlp.up_proj.weight",
    "layers/down_proj": "model.layers.{}.mlp.down_proj.weight",
    "layers/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}


def decoder_spec(config: dict) -> DecoderSpec:
    """The spec of a config.json, old or new form: transformers' own class fills in and converts.

    Raises:
      ValueError: the config asks for something that this decoder does not compute.
    """
    c = Gemma3TextConfig.from_dict(config)
    _refuse(c.attention_bias, "attention_bias=true")
    _refuse(c.use_bidirectional_attention, "use_bidirectional_attention=true")
    _refuse(c.attn_logit_softcapping, "attn_logit_softcapping")
    _refuse(c.hidden_activation != "gelu_pytorch_tanh", f"activation {c.hidden_activation!r}")
    for kind in c.layer_types:  # transformers knows more kinds than Gemma 3 has
        _refuse(kind not in _LAYER_KINDS, f"layer type {kind!r}")
    return DecoderSpec(
        family="gemma3",
        vocab_size=c.vocab_size,
        width=c.hidden_size,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        ffn_width=c.intermediate_size,
        norm_eps=c.rms_norm_eps,
        norm_offset=1.0,
        embedding_scale=c.hidden_size**0.5,
        query_scale=c.query_pre_attn_scalar**-0.5,
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        tied_embedding=c.tie_word_embeddings,
        is_global_L=tuple(kind == "full_attention" for kind in c.layer_types),
        window=c.sliding_window,
        rope_global=_rope(c.rope_parameters["full_attention"]),
        rope_local=_rope(c.rope_parameters["sliding_attention"]),
        final_softcap=c.final_logit_softcapping,
    )


def _rope(parameters: dict) -> RopeSpec:
    kind = parameters["rope_type"]
    if kind == "default":
        return RopeSpec(parameters["rope_theta"])
    _refuse(kind != "linear", f"rope_type {kind!r}")
    return RopeSpec(parameters["rope_theta"], parameters["factor"])


def _refuse(found, what: str):
    if found:
        raise ValueError(f"Gemma 3 with {what} is not supported")
