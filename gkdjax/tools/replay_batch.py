"""Computes the batch of a bad step again, row by row: which rows have a loss that is not finite.

    python -m gkdjax.tools.replay_batch RUN --step=N

The student is that of the newest checkpoint at or before the step. A teacher at a server is not
asked: its top k lies in the step's file. RUN is left as it is.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from gkdjax import config as config_lib
from gkdjax import tools
from gkdjax.losses.objective import DenseTargets, TeacherTargets
from gkdjax.teachers.scoring import request_targets
from gkdjax.train import bad_steps, optimizer, setup
from gkdjax.train.checkpoint import read_trainable, saved_steps
from gkdjax.train.step import make_loss
from gkdjax.train.workdir import saved_config


class ReplayedRow(NamedTuple):
    """A row of a bad step."""

    part: str  # "loss", or the name of an anchor
    name: str
    targets: int
    loss: float  # nats a target token
    teacher_is_finite: bool


def replay(run: pathlib.Path, step: int) -> Iterator[ReplayedRow]:
    """Yields each row with the loss that it has alone.

    Raises:
      UserError: no run, no such step, or what the run began with is gone.
    """
    line, parts = bad_steps.read(run, step)
    c = saved_config(run)
    c = dataclasses.replace(
        c,
        mesh=config_lib.Mesh(),
        train=dataclasses.replace(c.train, grad_accum_steps=1),
        teacher=dataclasses.replace(c.teacher, offline=c.teacher.is_server),
    )
    with contextlib.ExitStack() as connections:
        made = setup.assemble(setup.read(c, run, None, connections), run)
        state = setup.initial_state(made, optimizer.optimizer(c.optim, 1))
        trainable = state.trainable
        if steps := [saved for saved in saved_steps(run) if saved <= step]:
            _, trainable = read_trainable(run, trainable, max(steps))
        loss = make_loss(made.decoder, c, made.inputs.mesh)
        for name, part in parts.items():
            teacher = made.teacher if name == "loss" else made.anchor_teacher
            divergence = line["divergence"] if name == "loss" else c.anchor.divergence
            targets = part.targets
            if targets is None:
                asked = request_targets(teacher, part.batch, part.names, None, made.inputs.mesh)
                targets = asked()
            for i, row in enumerate(part.names):
                batch = jax.tree.map(lambda x, i=i: _repeated(x, i), part.batch)
                own = _row(targets, i)
                found = loss(trainable, made.frozen, batch, own, {}, divergence=divergence)
                outputs = own.hidden_BNE if isinstance(own, DenseTargets) else own.topk.logprobs
                bad = np.isnan(np.asarray(outputs, np.float32)) | np.isposinf(outputs)
                count = int(part.batch.target_mask_BN[i].sum())
                yield ReplayedRow(name, row, count, float(found), not bad.any())


def _repeated(x, row: int) -> np.ndarray:
    """A batch of that row alone: its mean is the row's."""
    return np.repeat(np.asarray(x)[row : row + 1], len(x), axis=0)


def _row(targets: TeacherTargets, row: int) -> TeacherTargets:
    if isinstance(targets, DenseTargets):  # its unembedding has no rows
        return dataclasses.replace(targets, hidden_BNE=_repeated(targets.hidden_BNE, row))
    return jax.tree.map(lambda x: _repeated(x, row), targets)


def _show(flags: argparse.Namespace) -> None:
    logging.set_verbosity(logging.WARNING)
    for row in replay(flags.run, flags.step):
        finite = np.isfinite(row.loss)
        whose = "" if finite else "the student" if row.teacher_is_finite else "the teacher"
        if row.targets == 0:
            whose = "no target"
        print(f"{row.part:10}  {row.name:40}  {row.targets:6} targets  {row.loss:12.6g}  {whose}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("replay_batch", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", type=pathlib.Path, help="The run's directory.")
    parser.add_argument("--step", type=int, required=True, help="The bad step.")
    return tools.run(parser, _show, argv)


if __name__ == "__main__":
    sys.exit(main())
