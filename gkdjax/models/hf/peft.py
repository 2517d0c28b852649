"""PEFT LoRA directories in and out, without torch or peft.

PEFT keeps two matrices a module, lora_A (r, in) and lora_B (out, r), under the name that the module
has in torch. Here a kernel's layers are stacked, so all of them have one rank and one scale.
"""

import functools
import pathlib
import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import logging

from gkdjax.config import Lora
from gkdjax.models import lora
from gkdjax.models.decoder_config import DecoderConfig, layer_shapes
from gkdjax.models.families import registry
from gkdjax.models.families.common import CheckpointNames
from gkdjax.models.hf import peft_config, writer
from gkdjax.models.hf.tensor_files import is_finite
from gkdjax.parallel import mesh
from gkdjax.utils.errors import UserError, one_line

_WEIGHTS = "adapter_model.safetensors"
_DTYPES = ("float32", "bfloat16", "float16")
# PEFT leaves the adapter's name, "default", out of a file; a plain state dict has it.
_OF_MODULE = re.compile(r"base_model\.model\.(.+?)\.lora_\w+(?:\.\w+)*")
_FOREIGN = re.compile(r".*(vision_tower|multi_modal_projector).*")
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")

Names = dict[tuple[int, str], str]  # (layer, "A" or "B") -> tensor name, of one stacked kernel


class Loaded(NamedTuple):
    """An adapter directory."""

    adapters: dict[str, lora.Adapter]  # float32, by path as "layers/q_proj"
    rules: Lora  # the directory's general rank and alpha; an adapter's own ones count
    base: str | None  # what the directory says it was trained on


def load_adapter(directory: str | pathlib.Path, spec: DecoderConfig) -> Loaded:
    """Reads what `peft.PeftModel.save_pretrained` wrote for a model of `spec`.

    Args:
      directory: holds adapter_config.json and adapter_model.safetensors.
      spec: the base's.

    Raises:
      UserError: a file is missing or damaged; the adapter is more than plain LoRA of the decoder's
        projections; a tensor is missing, unknown, doubled, not finite, or does not fit the base.
        All named. Tensors of modules that adapter_config.json excludes are passed over, as peft
        does, and told.
    """
    directory = pathlib.Path(directory)
    config = peft_config.read(directory)
    path = directory / _WEIGHTS
    tensors = _of_targets(config, _read(path))
    kernels, layouts = _place(path, tensors, spec)
    _check_targets(config, kernels, layouts, spec)
    adapters = {}
    for kernel, names in sorted(kernels.items()):
        modules = [_TENSOR.fullmatch(name)[1] for name in names.values()]
        rank, scale = config.rank_and_scale(modules)
        _check_shapes(config, tensors, names, layer_shapes(spec)[kernel], rank)
        a, b = (
            np.stack([tensors[names[layer, half]].T for layer in range(spec.num_layers)])
            for half in "AB"
        )
        adapters[f"layers/{kernel}"] = lora.Adapter(
            jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), scale, config.dropout
        )
    targets = tuple(sorted(kernels))
    rules = Lora(config.rank, config.plain_alpha, config.dropout, targets)
    return Loaded(adapters, rules, config.base)


def save_adapter(
    directory: pathlib.Path,
    spec: DecoderConfig,
    adapters: dict[str, lora.Adapter],
    model_type: str,
    base: str,
) -> None:
    """Writes the files that `peft.PeftModel.from_pretrained` reads.

    Args:
      directory: there already, and empty.
      spec: the base's.
      adapters: from training, of one dropout.
      model_type: of the base's config.json; it decides the names of the modules in torch.
      base: name of the base, a hub id or a path.
    """
    layout = registry.MODEL_TYPES[model_type].LAYOUTS[model_type][-1]  # torch's names are the last
    tensors = {}
    for path, adapter in adapters.items():
        module = _module(registry.module(spec).TENSORS[path], layout)
        for half, stacked in (("A", adapter.a), ("B", adapter.b)):
            for layer, matrix in enumerate(np.asarray(mesh.fetch(stacked), np.float32)):
                name = f"base_model.model.{module.format(layer)}.lora_{half}.weight"
                shape = matrix.shape[::-1]
                make = functools.partial(np.transpose, matrix)
                tensors[name] = writer.Tensor(matrix.dtype, shape, make)
    writer.save_tensors(tensors, directory / _WEIGHTS)
    peft_config.write(directory, adapters, layout, base)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    pickled = path.with_name("adapter_model.bin")
    if not path.is_file() and pickled.is_file():
        raise UserError(
            f"{pickled} is a pickle, which can run any program when it is read, so it is not;"
            " load it with peft if you trust it, and save_pretrained() writes it as safetensors"
        )
    if not path.is_file():
        raise UserError(f"{path.parent} holds no {_WEIGHTS}")
    try:
        tensors = safetensors.numpy.load_file(path)
    except Exception as error:  # safetensors raises its own type for each kind of damage
        raise UserError(f"{path} is not a readable safetensors file: {one_line(error)}") from error
    for name, tensor in tensors.items():
        if tensor.dtype.name not in _DTYPES:
            raise UserError(f"{path}: {name} is {tensor.dtype}; supported: {', '.join(_DTYPES)}")
        if not is_finite(tensor):
            raise UserError(
                f"{path}: tensor {name!r} holds NaN or infinity, so the file is damaged or the"
                " training that wrote it had failed; get it once more, or take an earlier one"
            )
    return tensors


def _of_targets(config: peft_config.PeftConfig, tensors: dict) -> dict[str, np.ndarray]:
    modules = {name: _OF_MODULE.fullmatch(name) for name in tensors}
    other = [name for name, found in modules.items() if found and not config.is_target(found[1])]
    if tensors and len(other) == len(tensors):
        raise UserError(
            f"{config.path}: target_modules = {config.targets!r}, exclude_modules and"
            f" layers_to_transform leave out every tensor of {_WEIGHTS}, {_listed(other)}; name"
            " the modules that were trained"
        )
    if other:
        logging.warning(
            "%s: %d tensors are of modules that target_modules, exclude_modules or"
            " layers_to_transform leave out, and passed over, as peft does: %s",
            *(config.path, len(other), _listed(other)),
        )
    return {name: tensor for name, tensor in tensors.items() if name not in other}


def _place(
    path: pathlib.Path, tensors: dict, spec: DecoderConfig
) -> tuple[dict[str, Names], set[CheckpointNames]]:
    """Kernel -> its tensors; each tensor has a place, and each place its tensor."""
    modules = _modules(spec)
    kernels: dict[str, Names] = {}
    layouts, unknown = set(), []
    for name in tensors:
        parts = _TENSOR.fullmatch(name)
        number = parts and re.search(r"\.(\d+)\.", parts[1])
        template = number and parts[1].replace(number[0], ".{}.", 1)
        if template not in modules:
            unknown.append(name)
            continue
        layout, kernel = modules[template]
        layouts.add(layout)
        other = kernels.setdefault(kernel, {}).setdefault((int(number[1]), parts[2]), name)
        if other != name:
            raise UserError(f"{path}: {other} and {name} are the same half of one adapter")
    if unknown and kernels and all(_FOREIGN.search(name) for name in unknown):
        raise UserError(
            f"{path}: no place for {_listed(unknown)}: they adapt the image encoder, which nothing"
            f" reads here; set exclude_modules = {_FOREIGN.pattern!r} in {peft_config.NAME}, and"
            " they are passed over, as peft does"
        )
    if unknown or not kernels:
        raise UserError(
            f"{path}: no place for {_listed(unknown)}; what can be loaded is lora_A and lora_B of"
            f" {', '.join(lora.ALL_LINEAR)} in the layers of the text decoder, so train the adapter"
            " with these as target_modules and nothing else"
        )
    for kernel, names in kernels.items():
        _check_layers(path, kernel, names, spec.num_layers)
    return kernels, layouts


def _modules(spec: DecoderConfig) -> dict[str, tuple[CheckpointNames, str]]:
    """Module name, {} for the layer -> (layout, kernel), in every layout of the family."""
    family = registry.module(spec)
    return {
        _module(family.TENSORS[f"layers/{kernel}"], layout): (layout, kernel)
        for layouts in family.LAYOUTS.values()
        for layout in layouts
        for kernel in lora.ALL_LINEAR
    }


def _module(template: str, layout: CheckpointNames) -> str:
    return layout.name(template).removesuffix(".weight")


def _check_layers(path: pathlib.Path, kernel: str, names: Names, num_layers: int) -> None:
    surplus = [name for (layer, _), name in names.items() if layer >= num_layers]
    if surplus:
        raise UserError(
            f"{path}: no place for {_listed(surplus)}: the model has {num_layers} layers, from 0;"
            " was the adapter trained on another base?"
        )
    places = [(layer, half) for layer in range(num_layers) for half in "AB"]
    missing = [f"layer {layer} lora_{half}" for layer, half in places if (layer, half) not in names]
    if missing:
        raise UserError(
            f"{path}: {kernel} lacks {_listed(missing)}; a kernel must be adapted in all"
            f" {num_layers} layers of the model or in none; was it trained on another base?"
        )


def _check_targets(
    config: peft_config.PeftConfig,
    kernels: dict,
    layouts: set[CheckpointNames],
    spec: DecoderConfig,
) -> None:
    """Raises UserError for a kernel that the config names as adapted and that has no tensors."""
    for template, (layout, kernel) in _modules(spec).items():
        absent = layout in layouts and kernel not in kernels
        if absent and config.is_target(template.format(0)):
            raise UserError(
                f"{config.path}: target_modules = {config.targets!r} names {kernel}, but {_WEIGHTS}"
                " holds no tensor of it; the directory is not whole"
            )


def _check_shapes(
    config: peft_config.PeftConfig,
    tensors: dict,
    names: Names,
    kernel_shape: tuple[int, ...],
    rank: int,
) -> None:
    _, fan_in, fan_out = kernel_shape
    wanted = {"A": (rank, fan_in), "B": (fan_out, rank)}
    for (_, half), name in names.items():
        if tensors[name].shape != wanted[half]:
            raise UserError(
                f"{config.path.with_name(_WEIGHTS)}: {name} has shape {tensors[name].shape}, not"
                f" {wanted[half]}, which is what rank {rank} of {peft_config.NAME} and this model"
                f" need; was it trained on another base? It says on {config.base!r}"
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(sorted(names)[:5]) or "nothing") + more
