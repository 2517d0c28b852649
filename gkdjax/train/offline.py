"""All that a run is going to ask its teacher at a server, asked ahead of it."""

import collections
import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Sequence

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
    rows: RunInputs, teacher: ServerTeacher, workdir: pathlib.Path, steps: int
) -> None:
    """Buys what the store of `teacher` lacks; what is there costs nothing.

    That is the teacher's text, of each refresh too, what it says of other text that the steps of
    the run learn from, and what the evaluation asks it. What the student is going to write nobody
    knows, so it is not there.

    Args:
      rows: of the run.
      teacher: whose store is filled.
      workdir: of the run, for the text.
      steps: of the run, all of them.
    """
    config = rows.config
    vocab_size = rows.sources.teacher_chat.shared or rows.vocab_size
    curriculum = OnPolicySchedule(config.gkd, config.train.seed, steps)

    def prepared(name: str, dataset: DistillDataset) -> DistillDataset:
        return rollout_teacher.prepare(config, name, dataset, teacher, workdir, vocab_size)

    if needs_teacher_text(config.gkd):
        first = dataset = prepared("train", rows.feed)
        every = config.rollout.refresh_every_steps or steps
        for at in range(0, steps, every):
            block = curriculum.steps_of_block(at, every, on_policy=False)
            if block and at > 0:
                dataset = rollout_teacher.refresh(config, first, teacher, workdir, block, at)
            _score(dataset, "train", block, teacher, rows)
    if config.anchor.reference == "teacher":
        for name, dataset in rows.anchor_feeds.items():
            _score(prepared(name, dataset), name, range(steps), teacher, rows)
    if rows.validation is not None:
        rows = dataclasses.replace(rows, validation=prepared("validation", rows.validation))
    rows.evaluation(teacher, vocab_size, untrained=None).ask_teacher()


def missing(
    config: Config, workdir: pathlib.Path, teacher: ServerTeacher, steps: int
) -> list[Request]:
    """What the store lacks of that; requests that depend on missing answers are not among it.

    Args:
      config: of the run.
      workdir: of the run; nothing is written there.
      teacher: with the store.
      steps: of the run, all of them.
    """
    log = dataclasses.replace(config.log, progress_bar=False)
    config = dataclasses.replace(config, log=log)
    with (
        contextlib.ExitStack() as nothing,
        tempfile.TemporaryDirectory() as aside,
        teacher.pool.collect_missing() as found,
    ):
        rows = setup.read(config, workdir, teacher, nothing)
        prefill_answers(rows, teacher, pathlib.Path(aside), steps)
    return found


def require_filled(
    config: Config, workdir: pathlib.Path, teacher: ServerTeacher, steps: int
) -> None:
    """Raises UserError that counts and names what an offline run would miss later."""
    lacking = missing(config, workdir, teacher, steps)
    if lacking:
        raise missing_error(lacking)


def _score(
    feed: DistillDataset, name: str, steps: Sequence[int], teacher: ServerTeacher, rows: RunInputs
) -> None:
    """What the teacher says of text that it did not write, in the batches that ask for it."""
    seen: set[int] = set()
    wanted = []
    for step in steps:
        here = set(feed.batch_rows(step).tolist())
        if not here <= seen:
            wanted.append(step)
            seen |= here
    waiting: collections.deque[Callable] = collections.deque()
    with text.bar(len(wanted), f"{name} read", shown=rows.config.log.progress_bar) as bar:
        for step in wanted:
            batch, kept = feed.batch(step)
            waiting.append(request_targets(teacher, batch, feed.names(step), kept, rows.mesh))
            if len(waiting) > _BATCHES:
                waiting.popleft()()
            bar.update()
        while waiting:
            waiting.popleft()()
