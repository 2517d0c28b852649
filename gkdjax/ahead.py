"""The batches of a run with what the teacher says of them; asked for before their step comes.

A teacher that works elsewhere answers for coming steps while the device computes this one. One in
this process shares the device, and computes when its step has come.
"""

from collections.abc import Callable
from typing import NamedTuple

from gkdjax import sharding
from gkdjax.asking import ask
from gkdjax.assemble import Run
from gkdjax.teachers.protocol import RemoteTeacher
from gkdjax.training_text import Drawn, TrainingText
from gkdjax.types import Batch, TeacherTargets, TrainState

_STEPS = 4  # that are asked for beside the one that is computed


class Ready(NamedTuple):
    """What a step computes with, on the devices, and how the batch came about."""

    batch: Batch
    targets: TeacherTargets
    anchors: dict[str, tuple[Batch, TeacherTargets]]  # by name
    drawn: Drawn  # on the host


class Ahead:
    """The steps of one run, each taken once and in order."""

    def __init__(self, parts: Run, text: TrainingText, steps: int):
        """Asks for nothing yet.

        Args:
          parts: of the run.
          text: of its batches.
          steps: of the run, all of them.
        """
        self._parts, self._text, self._steps = parts, text, steps
        remote = isinstance(parts.teacher, RemoteTeacher)
        self._ahead = _STEPS if remote else 0
        self._asked: dict[int, Callable[[], Ready]] = {}

    def take(self, step: int, state: TrainState) -> Ready:
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

    def _ask(self, step: int) -> Callable[[], Ready]:
        parts, drawn = self._parts, self._text.batch(step)
        targets = ask(parts.teacher, drawn.batch, drawn.names, drawn.kept, parts.mesh)
        anchors = {}
        for name, feed in parts.anchor_feeds.items():
            batch, kept = feed.batch(step)
            wait = ask(parts.anchor_teacher, batch, feed.names(step), kept, parts.mesh)
            anchors[name] = batch, wait

        def ready() -> Ready:
            scored = {
                name: (sharding.shard_rows(parts.mesh, batch), wait())
                for name, (batch, wait) in anchors.items()
            }
            return Ready(sharding.shard_rows(parts.mesh, drawn.batch), targets(), scored, drawn)

        return ready
