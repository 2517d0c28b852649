"""What a run takes on each device, and whether that fits."""

import dataclasses

from gkdjax.config import rows_at_once
from gkdjax.parallel import mesh
from gkdjax.train.planning import memory
from gkdjax.train.planning.memory import Parts, total
from gkdjax.train.planning.setup import PlanInputs


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on one device."""

    held: Parts  # from the first step to the last
    phases: dict[str, Parts]  # what each adds while it lasts; they do not overlap
    lower_bound: Parts  # there for certain, whatever the rows are

    @property
    def largest_phase(self) -> str:
        return max(self.phases, key=lambda name: total(self.phases[name]))

    @property
    def peak(self) -> int:
        return max(total(self.held) + total(self.phases[self.largest_phase]), self.least)

    @property
    def least(self) -> int:
        return total(self.lower_bound)


def make(setup: PlanInputs) -> Plan:
    """Traces the student, without weights.

    Raises:
      UserError: the mesh does not divide the rows or the weights, or adapters that fit no kernel.
    """
    check_rows(setup)
    phases = {
        "training step": memory.training_step(setup),
        "teacher's forward pass": memory.teacher_forward(setup),
        "writing of training text": memory.sampling(setup),
        "evaluation": memory.evaluation(setup),
    }
    phases = {name: parts for name, parts in phases.items() if parts}
    return Plan(memory.held(setup), phases, memory.lower_bound(setup))


def check_rows(setup: PlanInputs) -> None:
    """Raises UserError, as the run does, if the devices cannot share the rows."""
    for key, rows in rows_at_once(setup.config).items():
        mesh.check_rows(setup.mesh, key, rows)
