"""How the examples of one stream become view pairs."""

import dataclasses

import numpy as np

from gkdjax.data import views
from gkdjax.data.chat import Chat
from gkdjax.data.targets import TargetRules
from gkdjax.types import Example, Trajectory, ViewPair


@dataclasses.dataclass(frozen=True)
class ViewRules:
    """The arguments of `data.views.view_pair` that all rows of a stream share."""

    student_chat: Chat
    teacher_chat: Chat
    retained: int
    targets: TargetRules
    max_length: int
    too_long: str  # as `data.too_long`

    def pair(
        self, example: Example, trajectory: Trajectory | None, *, too_long: str | None = None
    ) -> tuple[ViewPair | None, views.Fate]:
        """As `view_pair`; what is to lose its beginning has lost it before: see `row_lengths`."""
        drops = (too_long or self.too_long) == "drop"
        return views.view_pair(
            example,
            self.student_chat,
            self.teacher_chat,
            retained=self.retained,
            targets=self.targets,
            trajectory=trajectory,
            max_length=self.max_length,
            too_long="drop" if drops else "truncate-right",
        )

    def prompts(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """-> (student's, teacher's) generation prompts."""
        return views.prompts(example, self.student_chat, self.teacher_chat, self.retained)

    def before_targets(self, example: Example) -> np.ndarray:
        """See `views.before_targets`."""
        return views.before_targets(example, self.teacher_chat, self.targets)

    def lengths(self, example: Example) -> tuple[int, int]:
        """-> tokens of the (student's, teacher's) view, of their prompts without a response."""
        return views.lengths(
            example,
            self.student_chat,
            self.teacher_chat,
            retained=self.retained,
            targets=self.targets,
        )

    def with_whole_responses(self) -> "ViewRules":
        """The same, whatever a trajectory says."""
        return dataclasses.replace(
            self, targets=dataclasses.replace(self.targets, whole_responses=True)
        )
