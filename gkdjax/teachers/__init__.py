"""What a teacher is, and what it is given and gives: `Teacher` and its dataclasses."""

import importlib

_NAMES = {  # where they are; they are loaded when they are asked for
    "Batch": "gkdjax.types",
    "Capabilities": "gkdjax.teachers.base",
    "DenseTargets": "gkdjax.losses.objective",
    "TokenTopK": "gkdjax.losses.topk",
    "Message": "gkdjax.types",
    "Prompt": "gkdjax.types",
    "RemoteTeacher": "gkdjax.teachers.base",
    "SamplingParams": "gkdjax.types",
    "Teacher": "gkdjax.teachers.base",
    "TopKLogprobs": "gkdjax.losses.topk",
    "TopKTargets": "gkdjax.losses.objective",
    "Completion": "gkdjax.types",
}
__all__ = list(_NAMES)


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)
