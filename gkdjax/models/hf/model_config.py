"""config.json of a model directory: what it says of the decoder, and what is refused."""

import pathlib

from huggingface_hub.errors import StrictDataclassError  # how transformers' configs refuse a field

from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.families import registry
from gkdjax.models.hf import config_keys
from gkdjax.utils import files
from gkdjax.utils.errors import UserError, one_line


def load_config(directory: str | pathlib.Path) -> dict:
    """The parsed config.json of a model directory, of a supported architecture.

    Raises:
      UserError: it is missing, does not parse, names an architecture that is not supported, or
        belongs to a quantised checkpoint or to one that brings its own code.
    """
    path = pathlib.Path(directory)
    if not path.is_dir():
        raise UserError(f"no such model directory: {directory}")
    if not (path / "config.json").is_file() and (path / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} is the directory of an adapter, not of a model; name its base as the"
            " model, and the directory as student.lora.init_from or teacher.adapter"
        )
    if not (path / "config.json").is_file():
        raise UserError(f"{directory} holds no config.json, so it is not a model directory")
    config = files.read_object(path / "config.json")
    _refuse_own_code(path, config)
    _check_architecture(path / "config.json", config)
    _refuse_quantised(path / "config.json", config)
    return config


def load_spec(directory: str | pathlib.Path) -> DecoderConfig:
    """The decoder's numbers, from config.json alone (cheap: no weights are read).

    Raises:
      UserError: as `load_config`, or a number that is wrong, or a key of which the decoder does not
        compute what transformers computes.
    """
    path, config = pathlib.Path(directory) / "config.json", load_config(directory)
    read = config_keys.understood(path, config)
    try:
        spec = registry.MODEL_TYPES[config["model_type"]].decoder_spec(read)
    except StrictDataclassError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path}: a field is missing or of another type than transformers expects"
            f" ({type(error).__name__}: {one_line(error)})"
        ) from error
    _check_spec(path, spec)
    return spec


def _check_spec(path: pathlib.Path, spec: DecoderConfig) -> None:
    """Refuses numbers that each could be, and that cannot be together."""
    if spec.num_heads % spec.num_kv_heads:
        raise UserError(
            f"{path}: num_attention_heads = {spec.num_heads} must be a multiple of"
            f" num_key_value_heads = {spec.num_kv_heads}"
        )
    if not all(spec.is_global_L) and (spec.window is None or spec.window < 1):
        raise UserError(
            f"{path}: sliding_window = {spec.window!r} must be a whole number above 0, as layers"
            " use it"
        )


def _refuse_own_code(directory: pathlib.Path, config: dict) -> None:
    tokenizer = directory / "tokenizer_config.json"
    parsed = {"config.json": config}
    if tokenizer.is_file():
        parsed[tokenizer.name] = files.read_object(tokenizer)
    for file, values in parsed.items():
        if values.get("auto_map"):
            raise UserError(
                f"{directory / file}: auto_map says that the repository brings its own code, and"
                " code from a checkpoint is never run; take a repository that transformers loads"
                " without trust_remote_code"
            )


def _check_architecture(path: pathlib.Path, config: dict) -> None:
    model_type, supported = config.get("model_type"), ", ".join(sorted(registry.MODEL_TYPES))
    if not isinstance(model_type, str) or model_type not in registry.MODEL_TYPES:
        raise UserError(
            f"{path}: model_type {model_type!r} is not supported; supported: {supported}"
        )
    architectures = config.get("architectures") or ()
    if isinstance(architectures, str):
        architectures = [architectures]
    if not isinstance(architectures, list | tuple):
        raise UserError(
            f"{path}: architectures = {architectures!r} must be a list of names, as"
            " ['LlamaForCausalLM']; it may be left out"
        )
    for architecture in architectures:
        multimodal = model_type == "gemma3" and architecture == "Gemma3ForConditionalGeneration"
        if not multimodal and not str(architecture).endswith("ForCausalLM"):
            raise UserError(
                f"{path}: architecture {architecture!r} is not supported: a causal language model"
                f" (...ForCausalLM, Gemma3ForConditionalGeneration) of model_type {supported} is"
            )


def _refuse_quantised(path: pathlib.Path, config: dict) -> None:
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config", "quantization"):
            settings = part.get(key) if isinstance(part, dict) else None
            if settings and key == "quantization":
                raise UserError(
                    f"{path}: the checkpoint is quantised by MLX ({key} = {settings!r}), which is"
                    " not supported; take the float one that it was made from, or make one with"
                    " mlx_lm.convert --dequantize"
                )
            if settings:
                method = settings.get("quant_method") if isinstance(settings, dict) else settings
                raise UserError(
                    f"{path}: the checkpoint is quantised ({key}.quant_method {method!r}), which is"
                    " not supported; take the float one that it was made from"
                )
