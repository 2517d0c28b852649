"""The families' common part: names in checkpoints, and fields of configs.

A config that the decoder does not compute is a ValueError.
"""

from typing import NamedTuple

from transformers import PretrainedConfig

from gkdjax.models.decoder_config import DecoderConfig, Llama3Scaling, RopeSpec

# Keys of a config.json that every family's `decoder_spec` reads, by itself or by way of the class.
KEYS = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"),
        *("max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta"),
        *("original_max_position_embeddings", "partial_rotary_factor"),
    }
)


class CheckpointNames(NamedTuple):
    """How the checkpoints of one model_type name the tensors of a family's `TENSORS`."""

    body: str = "model."  # stands in place of "model." at the start of a name
    head: str = "lm_head."  # stands in place of "lm_head."
    # Starts of the names of tensors that are no part of the text decoder; they are not read, and
    # pass from the source to an export as they are.
    foreign: tuple[str, ...] = ()

    def name(self, template: str) -> str:
        """A name of `TENSORS` as these checkpoints have it."""
        start, _, rest = template.partition(".")
        return {"model": self.body, "lm_head": self.head}[start] + rest


def silu_spec(
    title: str, c: PretrainedConfig, layer_types: list[str], window: int | None = None, **own
) -> DecoderConfig:
    """The spec of a family in Llama's mould: silu, and one rope for all layers.

    Args:
      title: the family's name in errors.
      c: its config; the class has filled in what the file leaves out.
      layer_types: the kind of each layer, as transformers calls them.
      window: of the local ones.
      own: further fields of `DecoderConfig`.
    """
    silu = c.hidden_act in ("silu", "swish")  # transformers has both names for one function
    refuse(title, not silu, f"hidden_act={c.hidden_act!r}")
    c.standardize_rope_params()  # as its model does: only now are keys beside the object looked at
    rope = rope_spec(title, c.rope_parameters)
    is_global_L, numbers = global_layers(title, layer_types), sizes(c)
    return DecoderConfig(
        **numbers,
        query_scale=numbers["head_dim"] ** -0.5,
        activation="silu",
        tied_embedding=c.tie_word_embeddings,
        is_global_L=is_global_L,
        window=window,
        rope_global=rope,
        rope_local=None if all(is_global_L) else rope,
        **own,
    )


def rope_spec(title: str, parameters: dict) -> RopeSpec:
    """The spec of a config's rope_parameters, or of one layer kind's part of them."""
    kind, partial = parameters["rope_type"], parameters.get("partial_rotary_factor")
    refuse(title, partial not in (None, 1.0), f"partial_rotary_factor={partial}")
    refuse(title, kind not in ("default", "linear", "llama3"), f"rope_type {kind!r}")
    keys = ["rope_theta"] if kind == "default" else ["rope_theta", "factor"]
    if kind == "llama3":
        keys += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for key in keys:
        refuse(title, parameters.get(key) is None, f"rope_type {kind!r} and no {key}")
    theta, *factor = (parameters[key] for key in keys)
    if kind != "llama3":
        return RopeSpec(theta, *factor)
    scaling = Llama3Scaling(*factor)
    mixed = scaling.low_freq_factor < scaling.high_freq_factor
    refuse(title, not mixed, "low_freq_factor that is not below high_freq_factor")
    return RopeSpec(theta, llama3=scaling)


def global_layers(title: str, layer_types: list[str]) -> tuple[bool, ...]:
    """`DecoderConfig.is_global_L` of a config's layer_types."""
    for kind in layer_types:  # transformers knows more kinds than these families have
        known = kind in ("full_attention", "sliding_attention")
        refuse(title, not known, f"layer type {kind!r}")
    return tuple(kind == "full_attention" for kind in layer_types)


def sizes(c: PretrainedConfig) -> dict:
    """The fields of `DecoderConfig` that every family's config has under the same names."""
    # No field of Qwen 2's class, but transformers' model takes it where a config.json has it.
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if not head_dim:
        raise ValueError(f"num_attention_heads exceeds hidden_size = {c.hidden_size}")
    return {
        "vocab_size": c.vocab_size,
        "width": c.hidden_size,
        "num_heads": c.num_attention_heads,
        "num_kv_heads": c.num_key_value_heads,
        "head_dim": head_dim,
        "ffn_width": c.intermediate_size,
        "norm_eps": c.rms_norm_eps,
        "context_length": c.max_position_embeddings,
    }


def refuse(title: str, found, what: str) -> None:
    """Raises ValueError if `found`: a number that the decoder would silently leave out."""
    if found:
        raise ValueError(f"{title} with {what} is not supported")
