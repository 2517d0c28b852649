"""Decoders, their families and their files."""

import importlib

_NAMES = {  # where they are; they are loaded when they are asked for
    "load_pretrained": "gkdjax.models.hf.load",
}
__all__ = ["load_pretrained"]


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)
