"""How far the student has moved where nothing was to change."""

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from gkdjax.config import Config
from gkdjax.data.views import ViewRules
from gkdjax.evaluation import scoring
from gkdjax.evaluation.scoring import Reader
from gkdjax.evaluation.texts import Texts, check_fits
from gkdjax.teachers.flax import FlaxTeacher
from gkdjax.types import Example


class SideEffects:
    """The untrained student (p) against the trained one (q), on what the untrained one says.

    Both read unrelated prompts as they stand, without the prefix.
    """

    def __init__(self, untrained: FlaxTeacher, config: Config, texts: Texts, mesh: Mesh):
        self._config, self._texts, self._mesh = config, texts, mesh
        for example in texts.examples:
            check_fits(example, len(texts.prompts(example)[0]), config.data.max_length)

    @classmethod
    def of(
        cls,
        untrained: FlaxTeacher | None,
        config: Config,
        rules: ViewRules,
        examples: Sequence[Example],
        mesh: Mesh,
    ) -> "SideEffects | None":
        """None where there are no prompts, or the untrained student is not here.

        Args:
          untrained: the student as it was, with its whole vocabulary.
          config: of the run.
          rules: of the run's rows.
          examples: the prompts.
          mesh: of the run.
        """
        if untrained is None or not examples:
            return None
        chat = rules.student_chat
        rules = dataclasses.replace(rules, teacher_chat=chat, retained=0)
        return cls(untrained, config, Texts(config, rules, untrained, examples, mesh), mesh)

    def of_student(self, student: Reader, rows: int | None = None) -> dict[str, float]:
        """Measures by name, see `scoring.mean_agreement`.

        Args:
          student: trained so far.
          rows: on so many prompts, the first ones; None: on all.
        """
        text = self._texts.teacher_text
        if rows is not None:
            text = text.first(rows)
        return scoring.mean_agreement(student, text, "student", self._config.gkd, self._mesh)
