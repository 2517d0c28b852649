"""Batches of a run with their teachers' targets, requested before their step comes.

A teacher that works elsewhere answers for coming steps while the device computes this one. A
teacher in this process shares the device, and computes when its step has come.
"""

import pathlib
from collections.abc import Callable

from gkdjax.models import sampler
from gkdjax.models.lora import student_params
from gkdjax.parallel.mesh import shard_rows
from gkdjax.rollout.schedule import OnPolicySchedule
from gkdjax.rollout.student import StudentRollouts
from gkdjax.rollout.teacher import refresh
from gkdjax.teachers.scoring import request_targets, steps_ahead
from gkdjax.train.setup import Run
from gkdjax.train.step import TrainBatch
from gkdjax.types import TrainState


class BatchPrefetcher:
    """The steps of one run; each is taken once and in order."""

    def __init__(self, run: Run, workdir: pathlib.Path, first_step: int, steps: int):
        """Continues at `first_step` of `steps`.

        Raises:
          UserError: the student's text of the steps before is not what it has to be.
        """
        config, self._dataset = run.inputs.config, run.inputs.dataset
        self._run, self._workdir, self._steps = run, workdir, steps
        self._schedule = OnPolicySchedule(config.gkd, config.train.seed, steps)
        self._student = StudentRollouts(
            self._dataset,
            self._schedule,
            workdir / "trajectories_student.jsonl",
            block=config.gkd.on_policy_buffer_steps,
            first_step=first_step,
        )
        self._refreshed_at = 0  # the step that the text of `self._dataset` was written for
        self._ahead = steps_ahead(run.teacher)
        self._requested: dict[int, Callable[[], TrainBatch]] = {}

    def take(self, step: int, state: TrainState) -> TrainBatch:
        """Waits for the batch of `step`; the batches of the steps after it are requested first.

        `state` is the student before the step: it may have to write.
        """
        self._student.write_if_due(step, self._student_writer(state))
        for s in range(step, min(step + 1 + self._ahead, self._steps)):
            # The student's text of a coming step may not be written yet; its turn comes later.
            if s not in self._requested and (
                not self._schedule.student_writes(s) or self._student.has(s)
            ):
                self._requested[s] = self._request(s)
        return self._requested.pop(step)()

    def _request(self, step: int) -> Callable[[], TrainBatch]:
        run, mesh = self._run, self._run.inputs.mesh
        batch, cached, counts = self._batch(step)
        names = {"loss": self._dataset.names(step)}
        targets = request_targets(run.teacher, batch, names["loss"], cached, mesh)
        anchors = {}
        for name, dataset in run.inputs.anchors.items():
            rows, known = dataset.batch(step)
            names[name] = dataset.names(step)
            wait = request_targets(run.anchor_teacher, rows, names[name], known, mesh)
            anchors[name] = rows, wait
        divergence = self._schedule.divergence(step)

        def ready() -> TrainBatch:
            scored = {
                name: (shard_rows(mesh, rows), wait()) for name, (rows, wait) in anchors.items()
            }
            own = shard_rows(mesh, batch), targets()
            return TrainBatch(*own, scored, divergence, names, batch, counts)

        return ready

    def _batch(self, step: int):
        """Returns a batch, its cached targets, and counts of rows that the student wrote."""
        counts = dict.fromkeys(("on_policy_rows", "refused_responses"), 0)
        counts |= dict.fromkeys(("dropped_rows", "truncated_rows"), 0)
        if self._schedule.student_writes(step):
            batch, *found = self._student.batch(step)
            return batch, None, dict(zip(counts, (len(batch.row_id_B), *found), strict=True))
        self._refresh_if_due(step)
        return *self._dataset.batch(step), counts

    def _refresh_if_due(self, step: int) -> None:
        config = self._run.inputs.config
        every = config.rollout.refresh_every_steps
        if every is None or step // every * every == self._refreshed_at:
            return
        # The teacher does not change: when it writes makes no difference, only for which steps.
        at = self._refreshed_at = step // every * every
        steps = self._schedule.steps_of_block(step, every, on_policy=False)
        teacher, workdir = self._run.teacher, self._workdir
        self._dataset = refresh(config, self._dataset, teacher, workdir, steps, at)

    def _student_writer(self, state: TrainState):
        run, inputs = self._run, self._run.inputs

        def write(prompts, row_seeds, prompt_length):
            return sampler.sample(
                run.decoder,
                student_params(run.frozen, state.trainable),
                prompts,
                row_seeds,
                sampler.sampling(inputs.config),
                stop_ids=inputs.sources.chat.stop_ids,
                batch_size=inputs.config.train.batch_size,
                lengths=(prompt_length,),
                mesh=inputs.mesh,
                vocab_size=run.shared_vocab,
            )

        return write
