"""The configuration: `default()` has every key, `parse()` checks what was made of it.

Nothing here imports jax, so that a bad value is answered at once.
"""

# ruff: noqa: F401 (the public names)
from gkdjax.config.parse import RENAMED, check_key, default, from_saved, parse, to_dict
from gkdjax.config.schema import (
    ASSETS,
    Anchor,
    AnchorSet,
    Checkpoint,
    Config,
    Context,
    Data,
    Eval,
    Gkd,
    Log,
    Lora,
    Mesh,
    Optim,
    RolloutConfig,
    Student,
    Teacher,
    Train,
    anchor_sets,
    rows_at_once,
)
