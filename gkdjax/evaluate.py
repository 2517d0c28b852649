"""Did it work: exact answers, and the distance to the prompted teacher, under each condition.

| condition          | who answers        | what it reads              |
|--------------------|--------------------|----------------------------|
| `base`             | student, untrained | the student's view         |
| `prompted_base`    | student, untrained | prefix and turns           |
| `prompted_teacher` | teacher            | prefix and turns           |
| `student`          | student, trained   | the student's view         |
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gkdjax import losses, progress, sharding
from gkdjax.config import Config, Gkd
from gkdjax.data import pipeline
from gkdjax.data.chat import Chat
from gkdjax.errors import UserError
from gkdjax.feed import ViewRules
from gkdjax.models.decoder import Decoder
from gkdjax.sampler import Sampling, sample
from gkdjax.teachers.flax import FlaxTeacher, predicting_hidden
from gkdjax.teachers.protocol import Teacher
from gkdjax.train_step import token_divergence
from gkdjax.types import Batch, Example, TeacherTargets, Trajectory

SAMPLES = 3  # answers that are shown side by side


@dataclasses.dataclass(frozen=True)
class Reader:
    """A model that answers: the untrained student, or the trained one."""

    decoder: Decoder
    params: dict
    chat: Chat


class Evaluation:
    """The questions of a run, asked of the base before training and of the student after it."""

    def __init__(
        self,
        config: Config,
        rules: ViewRules,
        teacher: Teacher,
        questions: Sequence[Example],
        abilities: dict[str, Sequence[Example]],
        prompts: Sequence[Example],
        buckets: Sequence[int],
        mesh: Mesh,
    ):
        """Renders every prompt once.

        Args:
          config: the run's.
          rules: how a question becomes a teacher's and a student's view.
          teacher: reads the prefix.
          questions: of the baked task; [] skips all conditions but the abilities.
          abilities: name -> questions that are asked as they stand, with their own prefix or none.
          prompts: of the training, to show answers to where there are no questions.
          buckets: padded lengths.
          mesh: of the run.
        """
        self._config, self._rules, self._teacher = config, rules, teacher
        self._questions, self._abilities = questions, abilities
        self._buckets, self._mesh = buckets, mesh
        self._greedy = Sampling(config.eval.max_new_tokens, temperature=0.0, top_p=1.0)
        longest = config.data.max_length
        self._prompts = [rules.prompts(question) for question in questions]
        for question, both in zip(questions, self._prompts, strict=True):
            _check_fits(question, max(map(len, both)), longest)
        fitting = (e for e in (*questions, *prompts) if max(map(len, rules.prompts(e))) < longest)
        self._shown = list(itertools.islice(fitting, SAMPLES))
        self._batches: list[tuple[Batch, TeacherTargets]] = []
        for named in (questions, *abilities.values()):
            _check_questions(named)

    def before(self, base: Reader) -> dict:
        """Asks base and teacher -> {condition, "abilities" or "samples": what was found}."""
        result = {}
        if self._questions:
            written = self._teacher_writes(self._prompts)
            self._batches = self._teacher_text(written)
            answers = [self._rules.teacher_chat.decode(t.ids) for t in written]
            result["base"] = self._measure("base", base, view="student")
            result["prompted_base"] = self._measure("prompted_base", base, view="teacher")
            result["prompted_teacher"] = {
                "exact_match": _exact_match(answers, self._questions),
                "forward_kl": self._teacher_to_itself(),
            }
        samples = {"question": [example.turns[-1].content for example in self._shown]}
        prompts = [self._rules.prompts(example) for example in self._shown]
        samples["base"] = self._ask(base, [student for student, _ in prompts], "samples")
        if self._teacher.capabilities.samples:
            written = self._teacher_writes(prompts)
            answers = [self._rules.teacher_chat.decode(t.ids) for t in written]
            samples["prompted_teacher"] = answers
        return result | {"abilities": self._ask_abilities(base), "samples": samples}

    def after(self, student: Reader) -> dict:
        """Asks the trained student -> as `before`, with the one condition "student"."""
        result = {}
        if self._questions:
            if not self._batches:  # a resumed run has not asked the teacher in this process
                self._batches = self._teacher_text(self._teacher_writes(self._prompts))
            result["student"] = self._measure("student", student, view="student")
        prompts = [self._rules.prompts(example)[0] for example in self._shown]
        samples = {"student": self._ask(student, prompts, "samples")}
        return result | {"abilities": self._ask_abilities(student), "samples": samples}

    def _measure(self, condition: str, reader: Reader, view: str) -> dict[str, float]:
        column = 0 if view == "student" else 1
        prompts = [both[column] for both in self._prompts]
        return {
            "exact_match": _exact_match(self._ask(reader, prompts, condition), self._questions),
            "forward_kl": self._forward_kl(reader, view),
        }

    def _ask(self, reader: Reader, prompts: Sequence[np.ndarray], what: str) -> list[str]:
        chunk = self._config.eval.batch_size
        answers: list[str] = []
        with progress.bar(len(prompts), what, shown=self._config.log.progress_bar) as bar:
            for start in range(0, len(prompts), chunk):
                part = prompts[start : start + chunk]
                written = sample(
                    reader.decoder,
                    reader.params,
                    part,
                    [0] * len(part),
                    self._greedy,
                    stop_ids=reader.chat.stop_ids,
                    batch_size=chunk,
                    lengths=self._buckets,
                    mesh=self._mesh,
                )
                answers += [reader.chat.decode(trajectory.ids) for trajectory in written]
                bar.update(len(part))
        return answers

    def _teacher_to_itself(self) -> float:
        """Measured where the teacher is in this process: not 0 if a view or a shift were wrong.

        Only the answers of another teacher are known, whose distance to itself is 0 by definition.
        """
        if not isinstance(self._teacher, FlaxTeacher):
            return 0.0
        itself = Reader(self._teacher.decoder, self._teacher.params, self._teacher.chat)
        return self._forward_kl(itself, view="teacher")

    def _ask_abilities(self, reader: Reader) -> dict[str, float]:
        result = {}
        for name, questions in self._abilities.items():
            prompts = [reader.chat.prompt_ids((*q.prefix, *q.turns), q.name) for q in questions]
            for question, prompt in zip(questions, prompts, strict=True):
                _check_fits(question, len(prompt), self._config.data.max_length)
            result[name] = _exact_match(self._ask(reader, prompts, name), questions)
        return result

    def _teacher_writes(self, prompts) -> list[Trajectory]:
        """What the prompted teacher says, greedily, to (student's, teacher's) prompts."""
        return self._teacher.sample([own for _, own in prompts], [0] * len(prompts), self._greedy)

    def _teacher_text(self, written: list[Trajectory]) -> list[tuple[Batch, TeacherTargets]]:
        pairs = [
            self._rules.pair(question, trajectory, too_long="truncate")[0]
            for question, trajectory in zip(self._questions, written, strict=True)
        ]
        rows = self._config.eval.batch_size
        batches = []
        for start in range(0, len(pairs), rows):
            part = pairs[start : start + rows]
            batch = pipeline.pad(
                part + part[-1:] * (rows - len(part)),
                self._buckets,
                self._rules.student_chat.pad_id,
            )
            real_B1 = np.arange(rows)[:, None] < len(part)
            batch = dataclasses.replace(batch, target_mask_BN=batch.target_mask_BN & real_B1)
            batches.append((batch, self._teacher.targets(batch)))
        return batches

    def _forward_kl(self, reader: Reader, view: str) -> float:
        """Nats per token of the teacher's own text, at `gkd.temperature`."""
        total = count = 0.0
        for batch, targets in self._batches:
            batch = sharding.shard_rows(self._mesh, batch)
            sums = _forward_kl_sums(
                reader.decoder, reader.params, batch, targets, self._config.gkd, view
            )
            total, count = total + float(sums[0]), count + float(sums[1])
        return total / count


@functools.partial(jax.jit, static_argnames=("decoder", "gkd", "view"))
def _forward_kl_sums(decoder: Decoder, params, batch: Batch, targets, gkd: Gkd, view: str):
    student, teacher = (
        (batch.student_tokens_BS, batch.student_mask_BS, batch.student_at_BN),
        (batch.teacher_tokens_BT, batch.teacher_mask_BT, batch.teacher_at_BN),
    )
    hidden_BND = predicting_hidden(decoder, params, *(student if view == "student" else teacher))
    logits_BNV = decoder.apply({"params": params}, hidden_BND, method="unembed")
    kl_BN = token_divergence(logits_BNV, targets, "forward_kl", gkd)
    mask_BN = batch.target_mask_BN
    return losses.masked_sum(kl_BN, mask_BN), jnp.sum(mask_BN, dtype=jnp.float32)


def recovery(base: float, prompted_teacher: float, student: float) -> float | None:
    """(student - base) / (prompted_teacher - base); None where the prefix changes nothing."""
    gap = prompted_teacher - base
    return None if gap == 0 else (student - base) / gap


def _exact_match(answers: Sequence[str], questions: Sequence[Example]) -> float:
    right = [a.strip() == q.answer.strip() for a, q in zip(answers, questions, strict=True)]
    return sum(right) / len(right)


def _check_questions(questions: Sequence[Example]) -> None:
    for question in questions:
        if question.answer is None:
            raise UserError(f"{question.name}: a question for the evaluation needs an 'answer'")


def _check_fits(question: Example, length: int, max_length: int) -> None:
    if length >= max_length:
        raise UserError(
            f"{question.name}: the question has {length} tokens with its prefix and leaves no room"
            f" in data.max_length = {max_length}; raise it"
        )
