"""config.json of a model directory: what it says of the decoder, and what is refused."""

import pathlib

from huggingface_hub.errors import StrictDataclassError  # how transformers' configs refuse a field

from gkdjax import json_object
from gkdjax.errors import UserError
from gkdjax.models import families
from gkdjax.models.spec import DecoderSpec


def load_config(directory: str | pathlib.Path) -> dict:
    """The parsed config.json of a model directory, of a supported architecture.

    Raises:
      UserError: it is missing, does not parse, names an architecture that is not supported, or
        belongs to a quantised checkpoint or to one that brings its own code.
    """
    path = pathlib.Path(directory)
    if not path.is_dir():
        raise UserError(f"no such model directory: {directory}")
    if not (path / "config.json").is_file():
        raise UserError(f"{directory} holds no config.json, so it is not a model directory")
    config = json_object.read(path / "config.json")
    _refuse_own_code(path, config)
    _check_architecture(path / "config.json", config)
    _refuse_quantised(path / "config.json", config)
    return config


def load_spec(directory: str | pathlib.Path) -> DecoderSpec:
    """The decoder's numbers, from config.json alone (cheap: no weights are read).

    Raises:
      UserError: as `load_config`, or a number that is wrong or that the decoder does not compute.
    """
    config = load_config(directory)
    try:
        return families.MODEL_TYPES[config["model_type"]].decoder_spec(config)
    except StrictDataclassError as error:
        raise UserError(f"{directory}/config.json: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{directory}/config.json: {type(error).__name__}: {error}") from error


def _refuse_own_code(directory: pathlib.Path, config: dict) -> None:
    tokenizer = directory / "tokenizer_config.json"
    parsed = {"config.json": config}
    if tokenizer.is_file():
        parsed[tokenizer.name] = json_object.read(tokenizer)
    for file, values in parsed.items():
        if values.get("auto_map"):
            raise UserError(
                f"{directory / file}: auto_map says that the repository brings its own code, and"
                " code from a checkpoint is never run; take a repository that transformers loads"
                " without trust_remote_code"
            )


def _check_architecture(path: pathlib.Path, config: dict) -> None:
    model_type, supported = config.get("model_type"), ", ".join(sorted(families.MODEL_TYPES))
    if not isinstance(model_type, str) or model_type not in families.MODEL_TYPES:
        raise UserError(
            f"{path}: model_type {model_type!r} is not supported; supported: {supported}"
        )
    architectures = config.get("architectures") or ()
    for architecture in [architectures] if isinstance(architectures, str) else architectures:
        multimodal = model_type == "gemma3" and architecture == "Gemma3ForConditionalGeneration"
        if not multimodal and not str(architecture).endswith("ForCausalLM"):
            raise UserError(
                f"{path}: architecture {architecture!r} is not supported: a causal language model"
                f" (...ForCausalLM, Gemma3ForConditionalGeneration) of model_type {supported} is"
            )


def _refuse_quantised(path: pathlib.Path, config: dict) -> None:
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            settings = part.get(key) if isinstance(part, dict) else None
            if settings:
                method = settings.get("quant_method") if isinstance(settings, dict) else settings
                raise UserError(
                    f"{path}: the checkpoint is quantised ({key}.quant_method {method!r}), which is"
                    " not supported; take the float one that it was made from"
                )
