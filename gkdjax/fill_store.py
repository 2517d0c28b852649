"""All that a run is going to ask its teacher at a server, asked ahead of it."""

import contextlib
import dataclasses
import pathlib
import tempfile

from gkdjax import progress, rows_of_run, training_text
from gkdjax.config import Config
from gkdjax.curriculum import Curriculum, needs_teacher_text
from gkdjax.data import pipeline, shapes
from gkdjax.feed import Feed
from gkdjax.rows_of_run import Rows
from gkdjax.teachers.http.pool import Request, missing_error
from gkdjax.teachers.http.teacher import HttpTeacher


def fill(rows: Rows, teacher: HttpTeacher, workdir: pathlib.Path, steps: int) -> None:
    """Buys what the store of `teacher` lacks; what is there costs nothing.

    That is the teacher's text, of each refresh too, what it says of text that rows bring, and what
    the evaluation asks it. What the student is going to write nobody knows, so it is not there.

    Args:
      rows: of the run; the feeds that are needed are prepared by it.
      teacher: whose store is filled.
      workdir: of the run, for the text.
      steps: of the run, all of them.
    """
    config, vocab_size = rows.config, rows.vocab_size
    if needs_teacher_text(config.gkd):
        training_text.prepare(config, "train", rows.feed, teacher, workdir, vocab_size)
        _score(rows.feed, "train", teacher, config)
        _refresh(rows, teacher, workdir, steps)
    if config.anchor.towards == "teacher":
        for name, feed in rows.anchor_feeds.items():
            training_text.prepare(config, name, feed, teacher, workdir, vocab_size)
            _score(feed, name, teacher, config)
    rows.evaluation(teacher, vocab_size).ask_teacher()


def missing(
    config: Config, workdir: pathlib.Path, teacher: HttpTeacher, steps: int
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
        rows = rows_of_run.read(config, workdir, teacher, nothing)
        fill(rows, teacher, pathlib.Path(aside), steps)
    return found


def require_filled(config: Config, workdir: pathlib.Path, teacher: HttpTeacher, steps: int) -> None:
    """Raises UserError that counts and names what an offline run would miss later."""
    lacking = missing(config, workdir, teacher, steps)
    if lacking:
        raise missing_error(lacking)


def _refresh(rows: Rows, teacher: HttpTeacher, workdir: pathlib.Path, steps: int) -> None:
    config = rows.config
    every = config.trajectory.refresh_every_steps
    curriculum = Curriculum(config.gkd, config.train.seed, steps)
    for at in range(every, steps, every) if every is not None else ():
        block = curriculum.steps_of_block(at, every, on_policy=False)
        if block:
            training_text.refresh(config, rows.feed, teacher, workdir, block, at)


def _score(feed: Feed, name: str, teacher: HttpTeacher, config: Config) -> None:
    """What the teacher says of text that it did not write, batch by batch."""
    pairs, size = feed.pairs_to_score(), config.eval.batch_size
    if not pairs:
        return
    with progress.bar(len(pairs), f"{name} read", shown=config.log.progress_bar) as bar:
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            shape = pipeline.BatchShape(*shapes.longest([pipeline.shape_of(p) for p in part]))
            teacher.targets(feed.pad(part, shape))
            bar.update(len(part))
