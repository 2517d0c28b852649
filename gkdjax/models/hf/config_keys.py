"""The keys of a config.json: which are read, which change nothing, and which are refused.

A model must compute here what it computes in transformers. Whatever makes transformers compute
otherwise than the decoder is refused by its name; what transformers does not read either is told.
"""

import functools
import pathlib
import sys
from collections.abc import Callable, Iterator

from transformers import PretrainedConfig

from gkdjax.models.families import registry
from gkdjax.utils.errors import UserError

# Keys that change no logits of a forward pass over text: how a file was made, training, sampling,
# the shape of what a call returns, an image encoder, and how often a product is cut.
_HARMLESS = {
    *("model_type", "architectures", "transformers_version", "dtype", "torch_dtype"),
    *("name_or_path", "auto_map", "finetuning_task", "task_specific_params", "tokenizer_class"),
    *("prefix", "is_llama_config", "is_decoder", "add_cross_attention", "use_bfloat16"),
    *("cross_attention_hidden_size", "pruned_heads", "tie_encoder_decoder", "tie_word_embeddings"),
    *("max_window_layers", "use_sliding_window"),  # not read where there is no window
    *("torchscript", "tf_legacy_loss", "pretraining_tp", "xla_device", "vision_config"),
    *("quantization", "quantization_config", "compression_config", "mm_tokens_per_image"),
    *("initializer_range", "attention_dropout", "use_cache", "gradient_checkpointing"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict"),
    *("num_labels", "id2label", "label2id", "problem_type", "classifier_dropout"),
    *("attn_implementation", "experts_implementation", "cache_implementation", "use_flash_attn"),
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "do_sample", "early_stopping"),
    *("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "min_length"),
    *("max_length", "repetition_penalty", "no_repeat_ngram_size", "num_return_sequences"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "output_scores", "suppress_tokens"),
    *("return_dict_in_generate", "begin_suppress_tokens", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "hidden_dropout", "resid_pdrop", "embd_pdrop"),
}
_HARMLESS_STARTS = ("_", "unsloth", "transformers.")
_HARMLESS_ENDS = ("_token_id", "_token_index")


def _is_off(value, config: dict) -> bool:
    return value in (None, False, 0) or value == {} or value == []


def _is_one(value, config: dict) -> bool:
    return value is None or value == 1


def _never_slides(value, config: dict) -> bool:
    """A window as long as the context cuts nothing off."""
    length = config.get("max_position_embeddings")
    return value is None or (_is_number(value) and _is_number(length) and value >= length)


def _only_full(value, config: dict) -> bool:
    return value is None or (isinstance(value, list) and set(map(str, value)) <= {"full_attention"})


# Keys that no class need have: transformers takes the first ones from whatever config has them
# (masks, caches, layers of their own), and other programs that load these architectures the rest.
# Each with the values that leave the computation as it is.
_READ_ANYWAY: dict[str, Callable[[object, dict], bool]] = {
    "is_causal": lambda value, config: value is True,  # transformers takes null for false
    "per_layer_config": _is_off,
    "layer_types": _only_full,
    "sliding_window": _never_slides,
    "attention_chunk_size": _is_off,
    "kv_sharing_modes": _is_off,
    "use_bidirectional_attention": _is_off,
    "attn_logit_softcapping": _is_off,
    "final_logit_softcapping": _is_off,
    "clip_qkv": _is_off,
    **dict.fromkeys(("logit_scale", "logits_scaling", "embedding_multiplier"), _is_one),
    **dict.fromkeys(("attention_multiplier", "residual_multiplier"), _is_one),
}

_OUTER_KEYS = frozenset({"text_config", "tie_word_embeddings"})
_LAYERS = ("full_attention", "sliding_attention", "attention")  # the last: an older name
_MOST_LAYERS = 10_000
_SIZES = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("sliding_window_pattern", "original_max_position_embeddings"),
}
_NUMBERS = {
    *("rms_norm_eps", "query_pre_attn_scalar", "final_logit_softcapping"),
    *("rope_theta", "rope_local_base_freq"),
}
_OBJECTS = {"rope_scaling", "rope_parameters", "text_config"}


def understood(path: pathlib.Path, config: dict) -> dict:
    """Keeps the part of a config that the family's `decoder_spec` reads, its values checked.

    Args:
      path: of the config.json, for errors.
      config: as parsed, of a supported model_type.

    Raises:
      UserError: a key that changes what transformers computes and that the decoder does not know,
        or a value that cannot be; the key and the value are named.
    """
    kept: dict = {}
    for start, part, cls, keys in _parts(config):
        _check_values(path, start, part, keys)
        _refuse_other(path, start, part, cls, keys)
        target = kept if not start else kept.setdefault("text_config", {})
        target |= {key: value for key, value in part.items() if key in keys | {"model_type"}}
    return kept


def passed_over(config: dict) -> list[str]:
    """Lists keys that neither transformers nor the decoder reads, though they say something.

    Args:
      config: has passed `understood`.
    """
    return sorted(
        f"{start}{key}"
        for start, part, cls, keys in _parts(config)
        for key, value in part.items()
        if key not in keys | _READ_ANYWAY.keys() | _defaults(cls).keys()
        and not _is_harmless(key)
        and not _is_off(value, part)
    )


def _parts(config: dict) -> Iterator[tuple[str, dict, type[PretrainedConfig], frozenset[str]]]:
    """(start of the keys' names, keys and values, their class, the keys that are read)."""
    family = registry.MODEL_TYPES[config["model_type"]]
    *outer, inner = family.CONFIGS[config["model_type"]]
    for cls in outer:
        yield "", config, cls, _OUTER_KEYS
    text = config.get("text_config") if outer else config
    if text is not None:
        yield "text_config." if outer else "", text, inner, family.KEYS


def _is_harmless(key: str) -> bool:
    return key in _HARMLESS or key.startswith(_HARMLESS_STARTS) or key.endswith(_HARMLESS_ENDS)


@functools.cache
def _defaults(cls: type[PretrainedConfig]) -> dict:
    return vars(cls())


def _refuse_other(
    path: pathlib.Path, start: str, config: dict, cls: type[PretrainedConfig], keys: frozenset[str]
) -> None:
    defaults = _defaults(cls)
    for key, value in config.items():
        if key in keys:
            continue  # the family's `decoder_spec` decides
        if key in _READ_ANYWAY:
            changes = not _READ_ANYWAY[key](value, config)
        else:
            changes = not _is_harmless(key) and key in defaults and defaults[key] != value
        if changes:
            raise UserError(
                f"{path}: {start}{key} = {value!r} changes what the model computes in other"
                " programs, and the decoder here does not compute that; take a model without it,"
                " or remove the key if the weights were trained without it"
            )


def _check_values(path: pathlib.Path, start: str, config: dict, keys: frozenset[str]) -> None:
    for key in keys & config.keys():
        value = config[key]
        limit = _MOST_LAYERS if key == "num_hidden_layers" else 2**31
        if value is None:
            continue
        if key == "layer_types":
            _check_layer_types(f"{path}: {start}{key}", value)
        if key in _OBJECTS and not isinstance(value, dict):
            raise UserError(f"{path}: {start}{key} = {value!r} must be an object")
        if key in _SIZES and not (_is_whole(value) and 0 < value < limit):
            raise UserError(f"{path}: {start}{key} = {value!r} must be a whole number above 0")
        if key in _NUMBERS and not (_is_number(value) and value > 0):
            raise UserError(f"{path}: {start}{key} = {value!r} must be a number above 0")


def _check_layer_types(where: str, value) -> None:
    """Names the odd one: transformers lists all kinds that it knows first."""
    if not isinstance(value, list):
        raise UserError(f"{where} = {value!r} must be a list of names")
    for kind in value:
        if kind not in _LAYERS:
            raise UserError(f"{where} holds {kind!r}, and layers here are of {', '.join(_LAYERS)}")


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max
