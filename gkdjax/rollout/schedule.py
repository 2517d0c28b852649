"""Says who writes the text of a step, and which divergence it is learnt with."""

import dataclasses

from gkdjax.config import Gkd
from gkdjax.utils import seeds


def needs_teacher_text(gkd: Gkd) -> bool:
    """Whether any batch may be off-policy."""
    always = gkd.on_policy_schedule == "constant" and gkd.on_policy_fraction == 1
    return not always or gkd.on_policy_warmup_steps > 0


@dataclasses.dataclass(frozen=True)
class OnPolicySchedule:
    """Off-policy in the warm-up; after it each batch is the student's with some probability."""

    gkd: Gkd
    seed: int
    steps: int  # of the whole run

    def probability(self, step: int) -> float:
        """The probability that the student writes the batch of a step."""
        after, fraction = step - self.gkd.on_policy_warmup_steps, self.gkd.on_policy_fraction
        if after < 0:
            return 0.0
        last = self.steps - 1 - self.gkd.on_policy_warmup_steps
        if self.gkd.on_policy_schedule == "constant" or last == 0:
            return fraction
        return fraction * after / last

    def student_writes(self, step: int) -> bool:
        draw = seeds.generator(self.seed, "on_policy", step).random()
        return bool(draw < self.probability(step))

    def steps_of_block(self, step: int, length: int, *, on_policy: bool) -> list[int]:
        """The on- or off-policy steps of the block of `length` steps that `step` belongs to.

        Blocks begin at the multiples of `length`.
        """
        first = step // length * length
        block = range(first, min(first + length, self.steps))
        return [s for s in block if self.student_writes(s) is on_policy]

    def divergence(self, step: int) -> str:
        warm = step < self.gkd.on_policy_warmup_steps
        return self.gkd.warmup_divergence if warm else self.gkd.divergence
