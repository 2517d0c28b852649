"""The text that a run learns from: the teacher's, first and refreshed, and the student's.

`curriculum` says which, `feed` and `on_policy` make the batches.
"""

import functools
import pathlib
from typing import NamedTuple

from gkdjax import models_of_run
from gkdjax.assemble import Run
from gkdjax.config import Config
from gkdjax.curriculum import Curriculum, needs_teacher_text
from gkdjax.data.pipeline import Kept
from gkdjax.errors import UserError
from gkdjax.feed import Feed
from gkdjax.on_policy import StudentText
from gkdjax.sampler import sample
from gkdjax.teachers.protocol import Teacher
from gkdjax.train_step import student_params
from gkdjax.trajectories.reuse import Source
from gkdjax.trajectories.rules import Author
from gkdjax.types import Batch, TrainState


class Drawn(NamedTuple):
    """What a step learns from."""

    batch: Batch
    names: list[str]  # of its rows
    kept: Kept | None  # what the teacher said when it wrote the batch
    divergence: str
    counts: dict[str, int]  # of rows that the student wrote


def feeds(parts: Run) -> dict[str, Feed]:
    """All streams of rows, by name."""
    own = {} if parts.validation is None else {"validation": parts.validation}
    return {"train": parts.feed, **own, **parts.anchor_feeds}


def write_first(parts: Run, workdir: pathlib.Path) -> None:
    """The first off-policy text, by the teacher of each stream; without off-policy steps, none.

    Raises:
      UserError: something is asked of the teacher's text, and the teacher writes none.
    """
    _check_use(parts)
    for name, feed in feeds(parts).items():
        teacher = parts.anchor_teacher if name in parts.anchor_feeds else parts.teacher
        if name != "train" or needs_teacher_text(parts.config.gkd):
            prepare(parts.config, name, feed, teacher, workdir, parts.shared_vocab)


def prepare(
    config: Config, name: str, feed: Feed, teacher: Teacher, workdir: pathlib.Path, vocab_size: int
) -> None:
    """The first text of one stream, in RUN/trajectories_NAME.jsonl.

    Args:
      config: of the run.
      name: of the stream.
      feed: its rows.
      teacher: writes where they bring no response.
      workdir: of the run.
      vocab_size: of the ids that student and teacher have in common.
    """
    feed.prepare(
        workdir / f"trajectories_{name}.jsonl",
        _author(config, teacher),
        source=_source(config, teacher, vocab_size) if name == "train" else None,
        **_how(config),
    )


def refresh(
    config: Config, feed: Feed, teacher: Teacher, workdir: pathlib.Path, steps: list[int], at: int
) -> None:
    """New text for the rows of some steps, in RUN/trajectories_train_STEP.jsonl.

    Args:
      config, feed, teacher, workdir: as for `prepare`.
      steps: that it is for.
      at: the first step of their block.
    """
    path = workdir / f"trajectories_train_{at:06d}.jsonl"
    feed.refresh(path, steps, at, _author(config, teacher), **_how(config))


class TrainingText:
    """The batches of data.train, step by step."""

    def __init__(self, parts: Run, workdir: pathlib.Path, first_step: int, steps: int):
        """Goes on at `first_step`, as a run does that was interrupted there.

        Args:
          parts: of the run; its feed is prepared, unless all batches are the student's.
          workdir: of the run.
          first_step: the first one that this process makes.
          steps: of the run, all of them.

        Raises:
          UserError: the student's text of the steps before is not what it has to be.
        """
        gkd = parts.config.gkd
        self._parts, self._workdir = parts, workdir
        self._curriculum = Curriculum(gkd, parts.config.train.seed, steps)
        path = workdir / "trajectories_student.jsonl"
        block = gkd.on_policy_buffer_steps
        self._student = StudentText(
            parts.feed, self._curriculum, path, block=block, first_step=first_step
        )
        self._refreshed_at = 0  # the step that the off-policy text of this moment was written for

    def begin(self, step: int, state: TrainState) -> None:
        """Lets the student write, if it is its turn; called for every step, in order.

        Args:
          step: of the run.
          state: the student before the step.
        """
        self._student.write_if_due(step, self._student_writer(state))

    def is_there(self, step: int) -> bool:
        """Whether the batch of a coming step can be had already: the student's may be unwritten."""
        return not self._curriculum.student_writes(step) or self._student.has(step)

    def batch(self, step: int) -> Drawn:
        """The batch of a step that is there; each is taken once, the teacher's in order."""
        divergence, names = self._curriculum.divergence(step), self._parts.feed.names(step)
        if self._curriculum.student_writes(step):
            batch, *counts = self._student.batch(step)
            rows = self._parts.config.train.batch_size
            return Drawn(batch, names, None, divergence, _counts(rows, *counts))
        self._refresh_if_due(step)
        batch, kept = self._parts.feed.batch(step)
        return Drawn(batch, names, kept, divergence, _counts(0, 0, 0, 0))

    def _refresh_if_due(self, step: int) -> None:
        every = self._parts.config.trajectory.refresh_every_steps
        if every is None or step // every * every == self._refreshed_at:
            return
        # The teacher does not change: when it writes makes no difference, only for which steps.
        self._refreshed_at = step // every * every
        steps = self._curriculum.steps_of_block(step, every, on_policy=False)
        parts = self._parts
        refresh(parts.config, parts.feed, parts.teacher, self._workdir, steps, self._refreshed_at)

    def _student_writer(self, state: TrainState):
        parts = self._parts

        def write(prompts, row_seeds, prompt_length):
            return sample(
                parts.decoder,
                student_params(parts.frozen, state.trainable),
                prompts,
                row_seeds,
                models_of_run.sampling(parts.config),
                stop_ids=parts.chat.stop_ids,
                batch_size=parts.config.train.batch_size,
                lengths=(prompt_length,),
                mesh=parts.mesh,
                vocab_size=parts.shared_vocab,
            )

        return write


def _check_use(parts: Run) -> None:
    c = parts.config.trajectory
    if needs_teacher_text(parts.config.gkd) and parts.feed.needs_responses():
        return
    for key, value in (("refresh_every_steps", c.refresh_every_steps), ("reuse", c.reuse)):
        if value:
            raise UserError(
                f"config.trajectory.{key} = {value!r} is for the teacher's text, and this run needs"
                " none: every row has a response, or all batches are the student's. Leave it out"
            )


def _counts(rows: int, refused: int, dropped: int, truncated: int) -> dict[str, int]:
    found = {"on_policy_rows": rows, "refused_responses": refused, "dropped_rows": dropped}
    return found | {"truncated_rows": truncated}


def _author(config: Config, teacher: Teacher) -> Author:
    how = models_of_run.sampling(config)
    return Author(teacher.description, functools.partial(teacher.sample, sampling=how))


def _how(config: Config) -> dict:
    return {"chunk": config.eval.batch_size, "show": config.log.progress_bar}


def _source(config: Config, teacher: Teacher, vocab_size: int) -> Source | None:
    if not config.trajectory.reuse:
        return None
    return Source(
        pathlib.Path(config.trajectory.reuse),
        teacher.description,
        config.teacher.top_k,
        config.gkd.temperature if teacher.capabilities.temperature else 1.0,
        vocab_size,
        text_alone=teacher.capabilities.scores,
    )
