"""PEFT LoRA directories in and out, without torch or peft.

PEFT has two matrices per module, lora_A (r, in) and lora_B (out, r), under the module's name in
torch. Here a kernel's layers are stacked, so all of them have one rank and one scale.
"""

import functools
import json
import math
import pathlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging

from gkdjax.config import Lora
from gkdjax.models import lora
from gkdjax.models.decoder_config import DecoderConfig, layer_shapes
from gkdjax.models.families import registry
from gkdjax.models.families.common import CheckpointNames
from gkdjax.models.hf import writer
from gkdjax.models.hf.tensor_files import DTYPES, open_safetensors, refuse_not_finite
from gkdjax.parallel import mesh
from gkdjax.utils import files
from gkdjax.utils.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DTYPES = ("float32", "bfloat16", "float16")
# A file of PEFT's leaves out the adapter's name, "default"; a plain state dict has it.
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_ANY_TENSOR = re.compile(r"base_model\.model\.(.+?)\.lora_\w+(?:\.\w+)*")
_IMAGE_ENCODER = re.compile(r".*(vision_tower|multi_modal_projector).*")

# PEFT's values for fields that the file leaves out; the targets are the same for all families here.
_DEFAULTS = {
    **{"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "base_model_name_or_path": None},
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "layers_pattern", "exclude_modules")),
    **dict.fromkeys(("target_modules", "layers_to_transform", "use_rslora")),
}
_DEFAULT_TARGETS = ["q_proj", "v_proj"]
# The fields that change nothing, and the only supported values of others. Any further field that is
# set is refused, also one that a later PEFT invents.
_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of init_lora_weights
}
_SUPPORTED = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    # The other initialisations change the base's weights, too.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


def _is_alpha(value) -> bool:
    return files.is_number(value) and value > 0


def _is_pattern(value, is_valid: Callable) -> bool:
    return not value or (isinstance(value, dict) and all(map(is_valid, value.values())))


def _are_modules(value) -> bool:
    return value is None or all(isinstance(name, str) for name in _as_list(value))


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


# Key -> (the check of its value, what the value must be).
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (files.is_count, "a whole number above 0"),
    "rank_pattern": (
        lambda v: _is_pattern(v, files.is_count),
        "an object of whole numbers above 0",
    ),
    "lora_alpha": (_is_alpha, "a number above 0, from 1e-12 to 1e12"),
    "base_model_name_or_path": (lambda v: v is None or isinstance(v, str), "a name or null"),
    "use_rslora": (lambda v: v is None or isinstance(v, bool), "true or false"),
    "alpha_pattern": (lambda v: _is_pattern(v, _is_alpha), "an object of numbers above 0"),
    "lora_dropout": (lambda v: files.is_number(v) and 0 <= v < 1, "a number in [0, 1)"),
    "layers_to_transform": (
        lambda v: v is None or all(type(layer) is int for layer in _as_list(v)),
        "numbers of layers",
    ),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"),
        (_are_modules, "names of modules or a regular expression"),
    ),
}

Names = dict[tuple[int, str], str]  # (layer, "A" or "B") -> tensor name, of one stacked kernel


class Loaded(NamedTuple):
    """An adapter directory."""

    adapters: dict[str, lora.Adapter]  # float32, by path as "layers/q_proj"
    rules: Lora  # the general rank and alpha; a pattern can give an adapter others
    base: str | None  # the directory's name for its base


def load_adapter(directory: str | pathlib.Path, spec: DecoderConfig) -> Loaded:
    """Reads the directory that `peft.PeftModel.save_pretrained` wrote for a model of `spec`.

    Tensors of modules that adapter_config.json excludes are passed over with a warning, as by peft.

    Raises:
      UserError: a file is missing or damaged; the adapter is more than plain LoRA of the decoder's
        projections; a tensor is missing, unknown, doubled, not finite, or does not fit the base.
        All named.
    """
    path = pathlib.Path(directory) / CONFIG
    config = _read_config(path)
    tensors = _read_tensors(path.with_name(WEIGHTS))
    try:
        return _load(path, config, tensors, spec)
    except re.error as error:
        raise UserError(
            f"{path}: {error.pattern!r} is no regular expression of modules: {error}"
        ) from None


def save_adapter(
    directory: pathlib.Path,
    spec: DecoderConfig,
    adapters: dict[str, lora.Adapter],
    model_type: str,
    base: str,
) -> None:
    """Writes the files that `peft.PeftModel.from_pretrained` reads; `base` is the base's name."""
    layout = registry.MODEL_TYPES[model_type].LAYOUTS[model_type][-1]  # torch's names are the last
    tensors = {}
    for path, adapter in adapters.items():
        module = _module(registry.module(spec).TENSORS[path], layout)
        for half, stacked in (("A", adapter.a), ("B", adapter.b)):
            for layer, matrix in enumerate(np.asarray(mesh.fetch(stacked), np.float32)):
                name = f"base_model.model.{module.format(layer)}.lora_{half}.weight"
                make = functools.partial(np.transpose, matrix)
                tensors[name] = writer.Tensor(matrix.dtype, matrix.shape[::-1], make)
    writer.save_tensors(tensors, directory / WEIGHTS)

    kernels = {path.removeprefix("layers/"): adapter for path, adapter in adapters.items()}
    ranks = {name: adapter.a.shape[-1] for name, adapter in kernels.items()}
    alphas = {name: _alpha(adapter) for name, adapter in kernels.items()}
    rank, alpha = (Counter(numbers.values()).most_common(1)[0][0] for numbers in (ranks, alphas))
    (dropout,) = {adapter.dropout for adapter in adapters.values()}
    targets = sorted(kernels)
    if layout.foreign:  # names alone would select the q_proj of an image encoder too
        targets = rf".*\blanguage_model\..*\.({'|'.join(targets)})"
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {name: other for name, other in alphas.items() if other != alpha},
        "lora_dropout": dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (directory / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def _alpha(adapter: lora.Adapter) -> float:
    """alpha / rank is the scale, to the bit where a short number allows it."""
    rank = adapter.a.shape[-1]
    short = round(adapter.scale * rank, 6)
    return short if short / rank == adapter.scale else adapter.scale * rank


def _read_config(path: pathlib.Path) -> dict:
    """Reads adapter_config.json -> the fields of `_DEFAULTS`, checked."""
    if not path.is_file():
        raise UserError(f"{path.parent} holds no {CONFIG}, so it is not a PEFT adapter directory")
    fields = files.read_object(path)
    if "peft_type" not in fields and fields.keys() & {"lora_parameters", "fine_tune_type"}:
        raise UserError(
            f"{path} is of an MLX adapter, not of PEFT's: its matrices have other names and forms;"
            " fuse it into a base that is not quantised with mlx_lm.fuse, and name the fused model"
            " as the model"
        )
    known = _DEFAULTS.keys() | _WITHOUT_EFFECT | _SUPPORTED.keys()
    refused = [key for key in fields if key not in known and fields[key]]
    refused += [key for key, allowed in _SUPPORTED.items() if fields.get(key) not in allowed]
    if refused:
        raise UserError(
            f"{path}: {refused[0]} = {fields.get(refused[0])!r} is not supported, only plain LoRA"
            " is; train without it, or let peft's merge_and_unload() merge the adapter into its"
            " base and name the merged model instead"
        )
    config = _DEFAULTS | fields
    for key, (is_valid, wanted) in _FORMS.items():
        if not is_valid(config[key]):
            raise UserError(f"{path}: {key} = {config[key]!r} must be {wanted}")
    config["rank_pattern"] = config["rank_pattern"] or {}
    config["alpha_pattern"] = config["alpha_pattern"] or {}
    if config["target_modules"] is None:
        config["target_modules"] = _DEFAULT_TARGETS
    return config


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    pickled = path.with_name("adapter_model.bin")
    if not path.is_file() and pickled.is_file():
        raise UserError(
            f"{pickled} is a pickle, which can run any program when it is read, so it is not;"
            " load it with peft if you trust it, and save_pretrained() writes it as safetensors"
        )
    if not path.is_file():
        raise UserError(f"{path.parent} holds no {WEIGHTS}")
    tensors = {}
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            kind = file.get_slice(name).get_dtype()
            dtype = str(np.dtype(DTYPES[kind])) if kind in DTYPES else kind
            if dtype not in _DTYPES:
                raise UserError(f"{path}: {name} is {dtype}; supported: {', '.join(_DTYPES)}")
            tensors[name] = file.get_tensor(name)
            refuse_not_finite(path, name, tensors[name])
    return tensors


def _load(path: pathlib.Path, config: dict, tensors: dict, spec: DecoderConfig) -> Loaded:
    names = [name for name in tensors if not _is_excluded(config, name)]
    excluded = [name for name in tensors if name not in names]
    if excluded and not names:
        raise UserError(
            f"{path}: target_modules = {config['target_modules']!r}, exclude_modules and"
            f" layers_to_transform leave out every tensor of {WEIGHTS}, {_listed(excluded)}; name"
            " the modules that were trained"
        )
    if excluded:
        logging.warning(
            "%s: %d tensors are of modules that target_modules, exclude_modules or"
            " layers_to_transform leave out, and passed over, as peft does: %s",
            *(path, len(excluded), _listed(excluded)),
        )
    kernels, adapters = _kernels(path, config, names, spec), {}
    for kernel, halves in sorted(kernels.items()):
        modules = [_TENSOR.fullmatch(name)[1] for name in halves.values()]
        rank = _one_value(path, config, "rank_pattern", config["r"], modules)
        alpha = _one_value(path, config, "alpha_pattern", config["lora_alpha"], modules)
        _, fan_in, fan_out = layer_shapes(spec)[kernel]
        shapes = {"A": (rank, fan_in), "B": (fan_out, rank)}
        for (_, half), name in halves.items():
            if tensors[name].shape != shapes[half]:
                raise UserError(
                    f"{path.with_name(WEIGHTS)}: {name} has shape {tensors[name].shape}, not"
                    f" {shapes[half]}, which is what rank {rank} of {CONFIG} and this model need;"
                    " was it trained on another base? It says on"
                    f" {config['base_model_name_or_path']!r}"
                )
        a, b = (
            np.stack([tensors[halves[layer, half]].T for layer in range(spec.num_layers)])
            for half in "AB"
        )
        a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
        scale = _scale(config, rank, alpha)
        adapters[f"layers/{kernel}"] = lora.Adapter(a, b, scale, float(config["lora_dropout"]))
    rank, alpha = config["r"], config["lora_alpha"]
    if config["use_rslora"]:
        alpha = _scale(config, rank, alpha) * rank  # `Lora` divides by the rank
    dropout = float(config["lora_dropout"])
    rules = Lora(rank, alpha, dropout, tuple(sorted(kernels)))
    return Loaded(adapters, rules, config["base_model_name_or_path"])


def _scale(config: dict, rank: int, alpha: float) -> float:
    """The factor of A B; rslora: Kalajdzievski 2023, arXiv:2312.03732."""
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def _one_value(
    path: pathlib.Path, config: dict, key: str, general: float, modules: list[str]
) -> float:
    """Rank or alpha of modules that are one stacked kernel here.

    A pattern's first key counts that is a regular expression of the name's end, as in PEFT.
    """
    values = {
        next((v for end, v in config[key].items() if re.match(rf"(.*\.)?({end})$", name)), general)
        for name in modules
    }
    if len(values) > 1:
        raise UserError(
            f"{path}: {key} = {config[key]!r} gives layers of {modules[0].rpartition('.')[2]}"
            f" different values, {sorted(values)}; the layers of a kernel are one stacked array"
            " here and need one"
        )
    return values.pop()


def _is_excluded(config: dict, tensor: str) -> bool:
    module = _ANY_TENSOR.fullmatch(tensor)
    return module is not None and not _is_target(config, module[1])


def _is_target(config: dict, module: str) -> bool:
    """Follows PEFT: layers count only beside a list of names."""
    targets, layers = config["target_modules"], config["layers_to_transform"]
    if _matches(config["exclude_modules"], module) or not _matches(targets, module):
        return False
    if isinstance(targets, str) or layers in (None, []):
        return True
    patterns = _as_list(config["layers_pattern"] or [])
    for start in [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]:
        found = re.match(rf"{start}\.(\d+)\.", module)
        if found:
            return int(found[found.re.groups]) in _as_list(layers)
    return False


def _matches(rule: list[str] | str | None, module: str) -> bool:
    if isinstance(rule, str):
        return rule == "all-linear" or re.fullmatch(rule, module) is not None
    return any(f".{module}".endswith(f".{end}") for end in rule or ())


def _kernels(
    path: pathlib.Path, config: dict, tensors: list[str], spec: DecoderConfig
) -> dict[str, Names]:
    """Kernel -> its tensors; each tensor has a place, and each place its tensor."""
    file, family = path.with_name(WEIGHTS), registry.module(spec)
    # Name of a module, {} for the layer -> (layout, kernel), in every layout of the family.
    modules = {
        _module(family.TENSORS[f"layers/{kernel}"], layout): (layout, kernel)
        for layouts in family.LAYOUTS.values()
        for layout in layouts
        for kernel in lora.ALL_LINEAR
    }
    kernels: dict[str, Names] = {}
    layouts, unknown = set(), []
    for name in tensors:
        found = _TENSOR.fullmatch(name)
        number = found and re.search(r"\.(\d+)\.", found[1])
        template = number and found[1].replace(number[0], ".{}.", 1)
        if template not in modules:
            unknown.append(name)
            continue
        layout, kernel = modules[template]
        layouts.add(layout)
        other = kernels.setdefault(kernel, {}).setdefault((int(number[1]), found[2]), name)
        if other != name:
            raise UserError(f"{file}: {other} and {name} are the same half of one adapter")
    if unknown and kernels and all(_IMAGE_ENCODER.search(name) for name in unknown):
        raise UserError(
            f"{file}: no place for {_listed(unknown)}: they adapt the image encoder, which nothing"
            f" reads here; set exclude_modules = {_IMAGE_ENCODER.pattern!r} in {CONFIG}, and they"
            " are passed over, as peft does"
        )
    if unknown or not kernels:
        raise UserError(
            f"{file}: no place for {_listed(unknown)}; what can be loaded is lora_A and lora_B of"
            f" {', '.join(lora.ALL_LINEAR)} in the layers of the text decoder, so train the adapter"
            " with these as target_modules and nothing else"
        )
    for kernel, names in kernels.items():
        _check_layers(file, kernel, names, spec.num_layers)
    for template, (layout, kernel) in modules.items():
        absent = layout in layouts and kernel not in kernels
        if absent and _is_target(config, template.format(0)):
            raise UserError(
                f"{path}: target_modules = {config['target_modules']!r} names {kernel}, but"
                f" {WEIGHTS} holds no tensor of it; the directory is not whole"
            )
    return kernels


def _module(template: str, layout: CheckpointNames) -> str:
    return layout.name(template).removesuffix(".weight")


def _check_layers(file: pathlib.Path, kernel: str, names: Names, num_layers: int) -> None:
    surplus = [name for (layer, _), name in names.items() if layer >= num_layers]
    if surplus:
        raise UserError(
            f"{file}: no place for {_listed(surplus)}: the model has {num_layers} layers, from 0;"
            " was the adapter trained on another base?"
        )
    places = [(layer, half) for layer in range(num_layers) for half in "AB"]
    missing = [f"layer {layer} lora_{half}" for layer, half in places if (layer, half) not in names]
    if missing:
        raise UserError(
            f"{file}: {kernel} lacks {_listed(missing)}; a kernel must be adapted in all"
            f" {num_layers} layers of the model or in none; was it trained on another base?"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(sorted(names)[:5]) or "nothing") + more
