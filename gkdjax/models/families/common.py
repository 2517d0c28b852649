"""What the families' tables share: names in checkpoints, rope fields of configs, refusals."""

import sys
from typing import NamedTuple

from transformers import PretrainedConfig

from gkdjax.models.decoder_config import Llama3Scaling, RopeSpec

# Keys of a config.json that every family's `decoder_spec` reads, by itself or by way of the class.
KEYS = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"),
        *("max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta"),
        *("original_max_position_embeddings", "partial_rotary_factor"),
    }
)


SILU = ("silu", "swish")  # transformers has both names for one function


class CheckpointNames(NamedTuple):
    """How the checkpoints of one model_type name the tensors that a family's `TENSORS` lists.

    Attributes:
      body: stands in place of "model." at the start of a name.
      head: stands in place of "lm_head.".
      foreign: starts of the names of tensors that are no part of the text decoder; they are not
        read, and pass from the source to an export as they are.
    """

    body: str = "model."
    head: str = "lm_head."
    foreign: tuple[str, ...] = ()

    def name(self, template: str) -> str:
        """A name of `TENSORS` as it stands in a checkpoint of this layout."""
        start, _, rest = template.partition(".")
        return {"model": self.body, "lm_head": self.head}[start] + rest


def one_rope(family: str, c: PretrainedConfig) -> RopeSpec:
    """Reads the spec of a config whose layers all turn alike.

    Raises:
      ValueError: as `rope_spec`.
    """
    c.standardize_rope_params()  # as its model does: only now are keys beside the object looked at
    return rope_spec(family, c.rope_parameters)


def rope_spec(family: str, parameters: dict) -> RopeSpec:
    """The spec of a config's rope_parameters, or of one layer kind's part of them.

    Raises:
      ValueError: a kind of scaling that the decoder does not compute.
    """
    theta, kind = parameters["rope_theta"], parameters["rope_type"]
    partial = parameters.get("partial_rotary_factor")
    refuse(family, partial not in (None, 1.0), f"partial_rotary_factor={partial}")
    _check_positive("rope_theta", theta)
    if kind == "default":
        return RopeSpec(theta)
    refuse(family, kind not in ("linear", "llama3"), f"rope_type {kind!r}")
    _check_positive("the rope factor", parameters["factor"])
    if kind == "linear":
        return RopeSpec(theta, linear_factor=parameters["factor"])
    for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        _check_positive(f"rope: {key}", parameters[key])
    scaling = Llama3Scaling(
        factor=parameters["factor"],
        low_freq_factor=parameters["low_freq_factor"],
        high_freq_factor=parameters["high_freq_factor"],
        original_length=parameters["original_max_position_embeddings"],
    )
    return RopeSpec(theta, llama3=scaling)


def _check_positive(name: str, value) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be positive, not {value!r}")


def global_layers(family: str, layer_types: list[str]) -> tuple[bool, ...]:
    """`DecoderConfig.is_global_L` of a config's layer_types.

    Raises:
      ValueError: a kind of layer that is neither full nor sliding attention.
    """
    for kind in layer_types:  # transformers knows more kinds than these families have
        known = kind in ("full_attention", "sliding_attention")
        refuse(family, not known, f"layer type {kind!r}")
    return tuple(kind == "full_attention" for kind in layer_types)


def sizes(c: PretrainedConfig) -> dict:
    """The fields of `DecoderConfig` that every family's config has under the same names."""
    return {
        "vocab_size": c.vocab_size,
        "width": c.hidden_size,
        "num_heads": c.num_attention_heads,
        "num_kv_heads": c.num_key_value_heads,
        "ffn_width": c.intermediate_size,
        "norm_eps": c.rms_norm_eps,
        "context_length": c.max_position_embeddings,
    }


def refuse(family: str, found, what: str) -> None:
    """Raises ValueError if `found`: a number that the decoder would silently leave out."""
    if found:
        raise ValueError(f"{family} with {what} is not supported")
