"""Orbax checkpoints of the train state, with the run's position and a fingerprint of each leaf."""

import contextlib
import functools
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from gkdjax.parallel import mesh, multihost
from gkdjax.types import TrainState
from gkdjax.utils import files, remote, tree
from gkdjax.utils.errors import NotWritten, Preempted, UserError


class Checkpoints:
    """Saves and restores under `run`/checkpoints, one directory for each step.

    A checkpoint is {"state": the leaves by path, "meta": JSON}. The JSON holds the step, which is
    also the position in the data (`data.batching.RowOrder` is a function of it), and a fingerprint
    of every leaf: Orbax restores a flipped bit without an error. Neither depends on the mesh.

    All processes of a run have the same directory, and call every method.
    """

    def __init__(
        self,
        run: pathlib.Path | epath.Path,
        keep: int,
        forever: Sequence[int] = (),
        before: Callable[[], None] | None = None,
    ):
        """Opens the directory; keeps the `keep` newest steps, and the steps `forever`.

        The leader calls `before` ahead of each save, for the run's other files; None: `settle`.
        """
        policies = ocp.checkpoint_managers
        policy = policies.AnyPreservationPolicy(
            [policies.LatestN(keep), policies.CustomSteps(list(forever))]
        )
        self._run, self._directory, self._keep = run, _directory_of(run), keep
        self._before = before or functools.partial(settle, run)
        self._failed: NotWritten | None = None
        self._begun, self._barrier = 0, multihost.Barrier()
        with remote.writing(self._directory):
            self._remove_unfinished()
            multihost.wait_for_all()
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policy,
                    async_options=ocp.AsyncOptions(barrier_sync_fn=self._barrier),
                ),
            )

    def save(self, state: TrainState, due: bool = True) -> None:
        """Begins to save; the write goes on in the background.

        A save that fails is told. Then the run goes on, and the next one is waited for.

        Args:
          state: may be donated afterwards.
          due: False: it is saved only if an earlier one could not be.

        Raises:
          NotWritten: this is due and fails, and so did the one before.
        """
        self._finish_together()
        leaves = _by_path(state)
        step = int(leaves["step"])
        saved = self._manager.all_steps()
        again = self._failed is not None
        if step in saved or not (due or again):
            return
        self._begun += 1
        self._barrier.begin(self._begun)
        try:
            multihost.on_leader(functools.partial(self._prepare, leaves, len(saved)))
            meta = {"step": step, "fingerprints": _fingerprints(leaves)}
            args = {"state": ocp.args.StandardSave(leaves), "meta": ocp.args.JsonSave(meta)}
            self._manager.save(step, args=ocp.args.Composite(**args))
            if again:
                self._manager.wait_until_finished()
                self._failed = None
        except Exception as error:  # see `_note`
            self._note(error)
        if again:
            self._agree()
            if due and self._failed is not None:
                raise self._failed

    def failed(self) -> bool:
        """Whether the last save was noticed to have failed, by this process."""
        if self._failed is None and not self._manager.is_saving_in_progress():
            self._finish()
        return self._failed is not None

    def restore(self, like: TrainState) -> TrainState | None:
        """Restores the newest checkpoint that is whole, in the structure of `like`; None if none.

        Its leaves are placed as those of `like`, on whatever mesh they were saved. A damaged
        checkpoint is named in the log, and the one before it is tried; it is renamed to
        "<step>.damaged", because Orbax saves nothing at or before a step that it has.

        Raises:
          UserError: there are checkpoints, and none of them can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for tried, step in enumerate(steps):
            state = None
            try:
                state = self._restore_step(step, like)
            except Exception as error:  # Orbax and tensorstore raise many types for damage
                logging.error("checkpoint %d of %s is damaged: %s", step, self._directory, error)
            if not multihost.any_of_all(state is None):
                self._put_aside(steps[:tried])
                return state
        if steps:
            raise UserError(
                f"none of the checkpoints {steps} in {self._directory} can be read (see above);"
                " move the directory away to start again"
            )
        return None

    def wait(self) -> None:
        """Returns when everything begun is on disk; NotWritten if the last save failed."""
        self._finish_together()
        if self._failed is not None:
            raise self._failed

    def close(self) -> None:
        self._finish()
        try:
            self._manager.close()
        except Exception as error:  # Orbax may raise twice what failed once
            self._note(error)
            self._manager.close()

    def _finish(self) -> None:
        """Waits for what was begun."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._note(error)

    def _finish_together(self) -> None:
        self._finish()
        self._agree()

    def _agree(self) -> None:
        """Has a failure that any process noted be noted by all."""
        try:
            with multihost.fail_together():
                if self._failed is not None:
                    raise self._failed
        except NotWritten as error:
            self._failed = error
            self._remove_unfinished()

    def _prepare(self, leaves: dict[str, jax.Array], saved: int) -> None:
        self._before()
        one = sum(leaf.nbytes for leaf in leaves.values())
        if not remote.is_remote(self._run):
            wanted = one * max(self._keep + 1 - saved, 1)
            files.require_room(self._directory, "a checkpoint", one, wanted)

    def _note(self, error: Exception) -> None:
        """Keeps and tells an error of the disk; raises any other."""
        if remote.is_remote(self._run):
            with remote.writing(self._run):
                raise error
        # Orbax raises OSError for its own files, and tensorstore's ValueError has the number.
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            error = OSError(int(code[1]), os.strerror(int(code[1])))
        if isinstance(error, OSError):
            error = files.not_written(self._directory, error)
        if not isinstance(error, NotWritten):
            raise error
        if self._failed is None:
            logging.warning("%s; the state is saved as soon as it can be", error)
        self._failed = error
        self._barrier.give_up(str(error))
        if jax.process_count() == 1:  # the others may still write there
            self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Removes the directories of saves that were killed or failed.

        Orbax can do it as well, but in a thread that outlives an early exit, with a traceback.
        """
        for unfinished in self._directory.glob("*.orbax-checkpoint-tmp"):
            if multihost.leads():
                shutil.rmtree(unfinished, ignore_errors=True)

    def _put_aside(self, steps: list[int]) -> None:
        for step in steps if multihost.leads() else ():
            aside = self._directory / f"{step}.damaged"
            aside.rmtree(missing_ok=True)
            (self._directory / str(step)).rename(aside)
        multihost.wait_for_all()
        if steps:
            self._manager.reload()

    def _restore_step(self, step: int, like: TrainState) -> TrainState:
        expected = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for path, leaf in _by_path(like).items()
        }
        wanted = ocp.args.StandardRestore(expected)
        args = ocp.args.Composite(state=wanted, meta=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        leaves = restored["state"]
        _check(leaves, restored["meta"]["fingerprints"])
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in expected])


def settle(workdir: pathlib.Path) -> None:
    """Has the lines that a run appended to its files on the disk, before a checkpoint is begun.

    So a power cut never leaves a checkpoint without the lines of the steps before it.
    """
    for path in (*workdir.glob("*.jsonl"), workdir):
        with files.writing(path):
            files.to_disk(path)


@contextlib.contextmanager
def continuable(workdir: str | os.PathLike) -> Iterator[None]:
    """Has a disk that takes no more end a run that has a checkpoint with Preempted."""
    try:
        yield
    except NotWritten as error:
        if not (steps := saved_steps(remote.place(workdir))):
            raise
        how = f"The run is saved at step {steps[-1]}; then run again"
        raise Preempted(f"{error}. {how}") from None


def read_trainable(
    run: pathlib.Path | epath.Path, like: Any, step: int | None = None
) -> tuple[int, Any]:
    """Reads the trainable leaves of a saved step -> (step, NumPy arrays, structured as `like`).

    Nothing is changed, so the run may be going on.

    Args:
      run: its directory.
      like: `TrainState.trainable` as `jax.ShapeDtypeStruct`s.
      step: None takes the newest checkpoint that is whole; damaged ones are named in the log.

    Raises:
      UserError: there is no such step (the error names those there are), or it cannot be read.
    """
    directory = _directory_of(run)
    steps = saved_steps(run)[::-1]
    if not steps:
        raise UserError(f"{directory} holds no checkpoint")
    if step is not None and step not in steps:
        raise UserError(f"{directory} holds no step {step}; there are {steps[::-1]}")
    for tried in steps if step is None else [step]:
        try:
            return tried, _read_trainable(directory / str(tried), like)
        except Exception as error:  # Orbax and tensorstore raise many types for damage
            logging.error("checkpoint %d of %s is damaged: %s", tried, directory, error)
            reason = str(error)[:300]  # tensorstore's go on for pages
    raise UserError(f"no checkpoint in {directory} can be read; step {tried}: {reason}")


def saved_steps(run: pathlib.Path | epath.Path) -> list[int]:
    """Steps with a checkpoint, whole or not, in order."""
    names = [path.name for path in _directory_of(run).glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def _directory_of(run: pathlib.Path | epath.Path) -> epath.Path:
    return epath.Path(run if remote.is_remote(run) else run.absolute()) / "checkpoints"


def _read_trainable(directory: epath.Path, like: Any) -> Any:
    expected = _by_path(like, "trainable/")
    wanted = ocp.args.PyTreeRestore(
        expected,
        restore_args=ocp.checkpoint_utils.construct_restore_args(expected),
        partial_restore=True,
    )
    args = ocp.args.Composite(state=wanted, meta=ocp.args.JsonRestore())
    reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler("state", "meta"))
    with contextlib.closing(reader):
        restored = reader.restore(directory, args=args)
    leaves, fingerprints = restored["state"], restored["meta"]["fingerprints"]
    saved = {path for path in fingerprints if path.startswith("trainable/")}
    if saved != expected.keys():
        raise ValueError(f"its leaves are not the config's: {sorted(saved ^ expected.keys())}")
    for path, leaf in leaves.items():
        if leaf.shape != expected[path].shape:
            raise ValueError(f"leaf {path} is {leaf.shape}, the config's {expected[path].shape}")
    _check(leaves, {path: fingerprints[path] for path in expected})
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in expected])


def _check(leaves: dict[str, Any], fingerprints: dict[str, int]) -> None:
    for path, found in _fingerprints({path: leaves[path] for path in fingerprints}).items():
        if found != fingerprints[path]:
            raise ValueError(f"leaf {path} does not have the fingerprint it was saved with")


def _by_path(state: Any, prefix: str = "") -> dict[str, Any]:
    """Names the leaves by path: plain names that outlive a change of our own classes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {prefix + tree.path_str(path): leaf for path, leaf in flat}


def _fingerprints(leaves: dict[str, Any]) -> dict[str, int]:
    """Computes 32 bits of each leaf on the devices, the same whatever its sharding."""
    return {path: int(found) for path, found in mesh.fetch(_on_devices(leaves)).items()}


@jax.jit
def _on_devices(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: _fingerprint(leaf) for path, leaf in leaves.items()}


def _fingerprint(leaf: jax.Array) -> jax.Array:
    """Sums, modulo 2**32, each number's bits mixed with its place.

    For one place the mix (MurmurHash3's last steps) maps different bits to different numbers, so
    that one damaged number is always seen; several hide each other once in 2**32.
    """
    width = leaf.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{width}").astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    mixed = bits ^ (place * jnp.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
