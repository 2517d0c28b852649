"""python tests/resume_save.py DIR NAME: saves step 5, and is killed while it saves step 7.

The kill comes when all that belongs into the directory NAME ("state" or "7") is written, and the
directory is about to get that name: whatever had been begun by then is left behind.
"""

import os
import pathlib
import signal
import sys

import builders
import jax.numpy as jnp
import optax

from gkdjax.train.checkpoint import Checkpoints
from gkdjax.train.step import init_state
from gkdjax.types import TrainState

DECODER, _ = builders.small_model()
LEFT, BEGUN = 5, 7  # the step that is whole, and the one that never will be


def state_at(step: int) -> TrainState:
    """Adapters that belong to the step alone."""
    state = init_state(builders.adapters(DECODER, seed=step), optax.sgd(1.0))
    return TrainState(jnp.asarray(step, jnp.int32), state.trainable, state.opt_state)


def kill_at_rename_to(name: str) -> None:
    rename = os.rename

    def renamed(source, target, **options):
        if pathlib.Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target, **options)

    os.rename = renamed


def main(directory: str, name: str) -> None:
    checkpoints = Checkpoints(pathlib.Path(directory), keep=5)
    checkpoints.save(state_at(LEFT))
    checkpoints.wait()
    kill_at_rename_to(name)
    checkpoints.save(state_at(BEGUN))
    checkpoints.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
