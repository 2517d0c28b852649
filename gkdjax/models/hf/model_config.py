"""config.json of a model directory: the decoder's numbers, and what is refused.

A model must compute here what it computes in transformers. A key that makes transformers compute
something that the decoder does not is refused by name; a key that neither reads is reported.
"""

import functools
import pathlib
from collections.abc import Iterator

from huggingface_hub.errors import StrictDataclassError  # how transformers' configs refuse a field
from transformers import PretrainedConfig

from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.families import registry
from gkdjax.utils import files
from gkdjax.utils.errors import UserError, one_line

# Keys that change no logits of a forward pass over text: how a file was made, training, sampling,
# the form of a call's result, an image encoder, the number of slices of a product.
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


_OFF = (None, False, 0, {}, [])
_ONE = (None, 1)
# Keys that transformers reads from any config (masks, caches, layers), whatever its class declares,
# and keys that other programs read for these architectures -> the values that change nothing.
_READ_ANYWAY: dict[str, tuple] = {
    "is_causal": (True,),  # transformers takes null for false
    "layer_types": (None,),  # and lists of "full_attention"
    "sliding_window": (None,),  # and a window as long as the context
    **dict.fromkeys(("per_layer_config", "attention_chunk_size", "kv_sharing_modes"), _OFF),
    **dict.fromkeys(("use_bidirectional_attention", "clip_qkv"), _OFF),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _OFF),
    **dict.fromkeys(("logit_scale", "logits_scaling", "embedding_multiplier"), _ONE),
    **dict.fromkeys(("attention_multiplier", "residual_multiplier"), _ONE),
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
    *("rope_theta", "rope_local_base_freq", "factor", "low_freq_factor", "high_freq_factor"),
}
_ROPES = {"rope_scaling", "rope_parameters", *_LAYERS}  # Gemma 3 has one for each kind of layer
_OBJECTS = _ROPES | {"text_config"}


def load_config(directory: str | pathlib.Path) -> dict:
    """Reads the config.json of a model directory.

    Raises:
      UserError: it is missing, does not parse, names an unsupported architecture, or belongs to a
        quantised checkpoint or to one with code of its own.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.parent.is_dir():
        raise UserError(f"no such model directory: {directory}")
    if not path.is_file() and path.with_name("adapter_config.json").is_file():
        raise UserError(
            f"{directory} is the directory of an adapter, not of a model; name its base as the"
            " model, and the directory as student.lora.init_from or teacher.adapter"
        )
    if not path.is_file():
        raise UserError(f"{directory} holds no config.json, so it is not a model directory")
    config = files.read_object(path)
    tokenizer = path.with_name("tokenizer_config.json")
    _refuse_own_code(path, config)
    if tokenizer.is_file():
        _refuse_own_code(tokenizer, files.read_object(tokenizer))
    _check_architecture(path, config)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            _refuse_quantised(path, part)
    return config


def load_spec(directory: str | pathlib.Path) -> DecoderConfig:
    """Reads the decoder's numbers from config.json alone: no weights are read.

    Raises:
      UserError: as `load_config`, or a wrong number, or a key with which transformers computes
        something that the decoder does not.
    """
    path, config = pathlib.Path(directory) / "config.json", load_config(directory)
    fields = _checked_fields(path, config)
    try:
        spec = registry.MODEL_TYPES[config["model_type"]].decoder_spec(fields)
    except (StrictDataclassError, ValueError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path}: a field is missing or of another type than transformers expects"
            f" ({type(error).__name__}: {one_line(error)})"
        ) from error
    if spec.num_heads % spec.num_kv_heads:
        raise UserError(
            f"{path}: num_attention_heads = {spec.num_heads} must be a multiple of"
            f" num_key_value_heads = {spec.num_kv_heads}"
        )
    if not all(spec.is_global_L) and not files.is_count(spec.window):
        raise UserError(
            f"{path}: sliding_window = {spec.window!r} must be a whole number above 0, as layers"
            " use it"
        )
    return spec


def unread_keys(config: dict) -> list[str]:
    """Lists the keys of an accepted config that are set and that nothing reads."""
    return sorted(
        f"{start}{key}"
        for start, part, cls, keys in _parts(config)
        for key, value in part.items()
        if key not in keys | _READ_ANYWAY.keys() | _defaults(cls).keys()
        and not _is_harmless(key)
        and value not in _OFF
    )


def _refuse_own_code(path: pathlib.Path, config: dict) -> None:
    if config.get("auto_map"):
        raise UserError(
            f"{path}: auto_map says that the repository brings its own code, and code from a"
            " checkpoint is never run; take a repository that transformers loads without"
            " trust_remote_code"
        )


def _check_architecture(path: pathlib.Path, config: dict) -> None:
    model_type, supported = config.get("model_type"), ", ".join(sorted(registry.MODEL_TYPES))
    if not isinstance(model_type, str) or model_type not in registry.MODEL_TYPES:
        raise UserError(
            f"{path}: model_type {model_type!r} is not supported; supported: {supported}"
        )
    architectures = config.get("architectures") or []
    if isinstance(architectures, str):
        architectures = [architectures]
    if not isinstance(architectures, list):
        raise UserError(
            f"{path}: architectures = {architectures!r} must be a list of names, as"
            " ['LlamaForCausalLM']; it may be left out"
        )
    for architecture in architectures:
        multimodal = model_type == "gemma3" and architecture == "Gemma3ForConditionalGeneration"
        if not multimodal and not str(architecture).endswith("ForCausalLM"):
            raise UserError(
                f"{path}: architectures: {architecture!r} is not supported: a causal language model"
                f" (...ForCausalLM, Gemma3ForConditionalGeneration) of model_type {supported} is"
            )


def _refuse_quantised(path: pathlib.Path, config: dict) -> None:
    if config.get("quantization"):
        raise UserError(
            f"{path}: the checkpoint is quantised by MLX (quantization ="
            f" {config['quantization']!r}), which is not supported; take the float one that it was"
            " made from, or make one with mlx_lm.convert --dequantize"
        )
    for key in ("quantization_config", "compression_config"):
        settings = config.get(key)
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else settings
            raise UserError(
                f"{path}: the checkpoint is quantised ({key}.quant_method {method!r}), which is not"
                " supported; take the float one that it was made from"
            )


def _checked_fields(path: pathlib.Path, config: dict) -> dict:
    """Checks all keys and their values -> the fields that the family's `decoder_spec` reads."""
    fields: dict = {}
    for start, part, cls, keys in _parts(config):
        target = fields
        if start:
            target = fields["text_config"] = {}
        for key, value in part.items():
            if key in keys:
                if value is not None:  # null is as left out: the class has a value
                    _check_value(f"{path}: {start}{key}", key, value)
            elif _changes_computation(key, part, cls):
                raise UserError(
                    f"{path}: {start}{key} = {value!r} changes what the model computes in other"
                    " programs, and the decoder here does not compute that; take a model without"
                    " it, or remove the key if the weights were trained without it"
                )
            if key in keys or key == "model_type":
                target[key] = value
    return fields


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


def _changes_computation(key: str, config: dict, cls: type[PretrainedConfig]) -> bool:
    value = config[key]
    if key in _READ_ANYWAY and value in _READ_ANYWAY[key]:
        return False
    if key == "layer_types":
        return not isinstance(value, list) or any(kind != "full_attention" for kind in value)
    if key == "sliding_window":
        length = config.get("max_position_embeddings")
        return not (files.is_number(value) and files.is_number(length) and value >= length)
    defaults = _defaults(cls)
    differs = not _is_harmless(key) and key in defaults and defaults[key] != value
    return key in _READ_ANYWAY or differs


def _check_value(where: str, key: str, value) -> None:
    if key == "layer_types":
        _check_layer_types(where, value)
    if key in _OBJECTS and not isinstance(value, dict):
        raise UserError(f"{where} = {value!r} must be an object")
    if key in _SIZES and not files.is_count(value):
        raise UserError(f"{where} = {value!r} must be a whole number above 0")
    if key == "num_hidden_layers" and value > _MOST_LAYERS:
        raise UserError(f"{where} = {value!r} must be at most {_MOST_LAYERS}")
    if key in _NUMBERS and not (files.is_number(value) and value > 0):
        raise UserError(f"{where} = {value!r} must be a number above 0, from 1e-12 to 1e12")
    if key in _ROPES:
        for name, inner in value.items():
            _check_value(f"{where}.{name}", name, inner)
        if "factor" in value and not value.keys() & {"rope_type", "type"}:
            raise UserError(f"{where} has a factor and no rope_type; add it, as linear or llama3")


def _check_layer_types(where: str, value) -> None:
    """Names the unknown type; transformers' own message begins with all types that it knows."""
    if not isinstance(value, list):
        raise UserError(f"{where} = {value!r} must be a list of names")
    for kind in value:
        if kind not in _LAYERS:
            raise UserError(f"{where} holds {kind!r}, and layers here are of {', '.join(_LAYERS)}")
