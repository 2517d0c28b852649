"""The batches of a run with what the teacher says of them; asked for before their step comes.

A teacher that works elsewhere answers for coming steps while the device computes this one. One in
this process shares the device, and computes when its step has come.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

from gkdjax.data.batching import CachedTargets
from gkdjax.losses.objective import TeacherTargets
from gkdjax.models import sampler
from gkdjax.models.lora import student_params
from gkdjax.models.sampler import sample
from gkdjax.parallel import mesh
from gkdjax.rollout.schedule import OnPolicySchedule
from gkdjax.rollout.student import StudentRollouts
from gkdjax.rollout.teacher import refresh
from gkdjax.teachers.scoring import request_targets, steps_ahead
from gkdjax.train.setup import Run
from gkdjax.types import Batch, TrainState


class SourcedBatch(NamedTuple):
    """What a step learns from."""

    batch: Batch
    names: list[str]  # of its rows
    kept: CachedTargets | None  # what the teacher said when it wrote the batch
    divergence: str
    counts: dict[str, int]  # of rows that the student wrote


class TrainBatch(NamedTuple):
    """What a step computes with, on the devices, and how the batch came about."""

    batch: Batch
    targets: TeacherTargets
    anchors: dict[str, tuple[Batch, TeacherTargets]]  # by name
    drawn: SourcedBatch  # on the host
    anchor_names: dict[str, list[str]]  # of the anchors' rows


class BatchSource:
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
        config, feed = parts.inputs.config, parts.inputs.feed
        self._parts, self._workdir = parts, workdir
        self._dataset = feed  # with the off-policy text of this moment
        self._curriculum = OnPolicySchedule(config.gkd, config.train.seed, steps)
        path = workdir / "trajectories_student.jsonl"
        block = config.gkd.on_policy_buffer_steps
        self._student = StudentRollouts(
            feed, self._curriculum, path, block=block, first_step=first_step
        )
        self._refreshed_at = 0  # the step that this text was written for

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

    def batch(self, step: int) -> SourcedBatch:
        """The batch of a step that is there; each is taken once, the teacher's in order."""
        divergence, names = self._curriculum.divergence(step), self._dataset.names(step)
        if self._curriculum.student_writes(step):
            batch, *counts = self._student.batch(step)
            rows = self._parts.inputs.config.train.batch_size
            return SourcedBatch(batch, names, None, divergence, _counts(rows, *counts))
        self._refresh_if_due(step)
        batch, kept = self._dataset.batch(step)
        return SourcedBatch(batch, names, kept, divergence, _counts(0, 0, 0, 0))

    def _refresh_if_due(self, step: int) -> None:
        every = self._parts.inputs.config.rollout.refresh_every_steps
        if every is None or step // every * every == self._refreshed_at:
            return
        # The teacher does not change: when it writes makes no difference, only for which steps.
        self._refreshed_at = step // every * every
        steps = self._curriculum.steps_of_block(step, every, on_policy=False)
        config, teacher = self._parts.inputs.config, self._parts.teacher
        how = teacher, self._workdir, steps, self._refreshed_at
        self._dataset = refresh(config, self._dataset, *how)

    def _student_writer(self, state: TrainState):
        parts, inputs = self._parts, self._parts.inputs

        def write(prompts, row_seeds, prompt_length):
            return sample(
                parts.decoder,
                student_params(parts.frozen, state.trainable),
                prompts,
                row_seeds,
                sampler.sampling(inputs.config),
                stop_ids=inputs.sources.chat.stop_ids,
                batch_size=inputs.config.train.batch_size,
                lengths=(prompt_length,),
                mesh=inputs.mesh,
                vocab_size=parts.shared_vocab,
            )

        return write


class BatchPrefetcher:
    """The steps of one run, each taken once and in order."""

    def __init__(self, parts: Run, text: BatchSource, steps: int):
        """Asks for nothing yet.

        Args:
          parts: of the run.
          text: of its batches.
          steps: of the run, all of them.
        """
        self._parts, self._text, self._steps = parts, text, steps
        self._ahead = steps_ahead(parts.teacher)
        self._asked: dict[int, Callable[[], TrainBatch]] = {}

    def take(self, step: int, state: TrainState) -> TrainBatch:
        """What `step` needs, waited for; the steps after it are asked for first.

        Args:
          step: of the run.
          state: the student before the step.
        """
        self._text.begin(step, state)
        for s in range(step, min(step + 1 + self._ahead, self._steps)):
            # The student's text of a coming step may not be written yet; its turn comes later.
            if s not in self._asked and self._text.is_there(s):
                self._asked[s] = self._ask(s)
        return self._asked.pop(step)()

    def _ask(self, step: int) -> Callable[[], TrainBatch]:
        parts, drawn, devices = self._parts, self._text.batch(step), self._parts.inputs.mesh
        targets = request_targets(parts.teacher, drawn.batch, drawn.names, drawn.kept, devices)
        anchors, names = {}, {}
        for name, feed in parts.inputs.anchor_feeds.items():
            batch, kept = feed.batch(step)
            names[name] = feed.names(step)
            wait = request_targets(parts.anchor_teacher, batch, names[name], kept, devices)
            anchors[name] = batch, wait

        def ready() -> TrainBatch:
            scored = {
                name: (mesh.shard_rows(devices, batch), wait())
                for name, (batch, wait) in anchors.items()
            }
            batch = mesh.shard_rows(devices, drawn.batch)
            return TrainBatch(batch, targets(), scored, drawn, names)

        return ready


def _counts(rows: int, refused: int, dropped: int, truncated: int) -> dict[str, int]:
    found = {"on_policy_rows": rows, "refused_responses": refused, "dropped_rows": dropped}
    return found | {"truncated_rows": truncated}
