"""Distils any teacher into a student, and bakes a context into it.

gkdjax.run(config, workdir)  # as `python -m gkdjax.main` does
"""

import importlib

_NAMES = {  # where they are; they are loaded when they are asked for
    "run": "gkdjax.train.run",
}
__all__ = ["run"]


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)
