"""Asks a teacher at a server, ahead of a run, for all that the run is going to ask."""

import collections
import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence

from gkdjax.config import Config
from gkdjax.data.dataset import DistillDataset
from gkdjax.rollout import teacher as rollout_teacher
from gkdjax.rollout.schedule import OnPolicySchedule, needs_teacher_text
from gkdjax.teachers.scoring import request_targets
from gkdjax.teachers.server.answers import Request
from gkdjax.teachers.server.scheduler import missing_error
from gkdjax.teachers.server.teacher import ServerTeacher
from gkdjax.train import setup
from gkdjax.train.setup import RunInputs
from gkdjax.utils import text

_BATCHES = 4  # that are under way


def prefill_answers(
    inputs: RunInputs, teacher: ServerTeacher, workdir: pathlib.Path, steps: int
) -> None:
    """Buys what the store of `teacher` lacks; what is there costs nothing.

    These are the teacher's text, of each refresh too, its targets for other text that the run
    learns from, and its answers in the evaluation. What the student will write is unknown yet.

    Args:
      workdir: of the run, for the text.
      steps: of the run, all of them.
    """
    config = inputs.config
    vocab_size = inputs.sources.teacher_chat.shared or inputs.vocab_size
    schedule = OnPolicySchedule(config.gkd, config.train.seed, steps)

    def prepared(name: str, dataset: DistillDataset) -> DistillDataset:
        return rollout_teacher.prepare(config, name, dataset, teacher, workdir, vocab_size)

    if needs_teacher_text(config.gkd):
        first = dataset = prepared("train", inputs.dataset)
        every = config.rollout.refresh_every_steps or steps
        for at in range(0, steps, every):
            block = schedule.steps_of_block(at, every, on_policy=False)
            if block and at > 0:
                dataset = rollout_teacher.refresh(config, first, teacher, workdir, block, at)
            _score(dataset, "train", block, teacher, inputs)
    if config.anchor.reference == "teacher":
        for name, dataset in inputs.anchors.items():
            _score(prepared(name, dataset), name, range(steps), teacher, inputs)
    if inputs.validation is not None:
        validation = prepared("validation", inputs.validation)
        inputs = dataclasses.replace(inputs, validation=validation)
    inputs.evaluation(teacher, vocab_size, untrained=None).ask_teacher()


def missing(
    config: Config, workdir: pathlib.Path, teacher: ServerTeacher, steps: int
) -> list[Request]:
    """Returns what the store lacks of that, without requests that depend on missing answers.

    Nothing is written in `workdir`.
    """
    log = dataclasses.replace(config.log, progress_bar=False)
    config = dataclasses.replace(config, log=log)
    with (
        contextlib.ExitStack() as nothing,
        tempfile.TemporaryDirectory() as aside,
        teacher.pool.collect_missing() as found,
    ):
        inputs = setup.read(config, workdir, teacher, nothing)
        prefill_answers(inputs, teacher, pathlib.Path(aside), steps)
    return found


def require_filled(
    config: Config, workdir: pathlib.Path, teacher: ServerTeacher, steps: int
) -> None:
    """Raises UserError that counts and names what an offline run would miss later."""
    if lacking := missing(config, workdir, teacher, steps):
        raise missing_error(lacking)


def _score(
    dataset: DistillDataset,
    name: str,
    steps: Sequence[int],
    teacher: ServerTeacher,
    inputs: RunInputs,
) -> None:
    """Requests targets for text that the teacher did not write, in the batches of the run."""
    seen: set[int] = set()
    wanted = []
    for step in steps:
        rows = set(dataset.batch_rows(step).tolist())
        if not rows <= seen:
            wanted.append(step)
            seen |= rows
    waiting = collections.deque()
    with text.bar(len(wanted), f"{name} read", shown=inputs.config.log.progress_bar) as bar:
        for step in wanted:
            batch, cached = dataset.batch(step)
            names = dataset.names(step)
            waiting.append(request_targets(teacher, batch, names, cached, inputs.mesh))
            if len(waiting) > _BATCHES:
                waiting.popleft()()
            bar.update()
        for wait in waiting:
            wait()
