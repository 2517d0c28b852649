"""The families by the model_type of config.json; a new one is a module and a line here."""

import types

from gkdjax.models.decoder_config import DecoderConfig, param_shapes
from gkdjax.models.families import gemma3, llama, qwen2, qwen3
from gkdjax.models.families.common import CheckpointNames

_MODULES = {"gemma3": gemma3, "llama": llama, "qwen2": qwen2, "qwen3": qwen3}
MODEL_TYPES = {kind: module for module in _MODULES.values() for kind in module.LAYOUTS}


def module(spec: DecoderConfig) -> types.ModuleType:
    """Finds the family's module.

    It has `TENSORS`, `LAYOUTS`, and `decoder_spec`, which reads a config.json of old or new form
    and raises ValueError at what the decoder does not compute; `CONFIGS`, the classes of a
    model_type's config.json from the outermost one to that of the text decoder; and `KEYS`, what
    `decoder_spec` reads of the latter.
    """
    return _MODULES[spec.family]


def tensor_names(spec: DecoderConfig, layout: CheckpointNames) -> dict[str, str]:
    """Leaf path -> HF tensor name, {} for the layer, of each parameter that the decoder has."""
    table = module(spec).TENSORS
    return {path: layout.name(table[path]) for path in param_shapes(spec)}
