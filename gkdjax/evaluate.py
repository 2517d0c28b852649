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

import numpy as np
from absl import logging
from jax.sharding import Mesh

from gkdjax import losses, progress, scoring
from gkdjax.asking import ask
from gkdjax.config import Config
from gkdjax.data import pipeline, row_lengths, shapes
from gkdjax.data.chat import Chat
from gkdjax.data.targets import TargetRules
from gkdjax.data.views import ViewRules
from gkdjax.errors import UserError
from gkdjax.examples_of_run import Examples
from gkdjax.sampler import Sampling
from gkdjax.scoring import Reader, Scored
from gkdjax.teachers.flax import FlaxTeacher
from gkdjax.teachers.protocol import Teacher
from gkdjax.types import Example, Prompt, Trajectory, View, ViewPair

SAMPLES = 3  # answers that are shown side by side


class Evaluation:
    """What is asked of the base before training, of the student on the way, and after it.

    Texts and answers are greedy: the same at every time, but for what the student has learnt.
    """

    def __init__(
        self,
        config: Config,
        rules: ViewRules,
        teacher: Teacher,
        examples: Examples,
        lengths: Sequence[int],
        mesh: Mesh,
        shared_vocab: int,
    ):
        """Renders every prompt once.

        Args:
          config: the run's.
          rules: how a question becomes a teacher's and a student's view.
          teacher: reads the prefix.
          examples: the divergences are taken on the text of `held_out`, or else of `questions`;
            samples are answers to what is asked, or else to what is trained.
          lengths: padded prompt lengths for sampling.
          mesh: of the run.
          shared_vocab: ids below it have a row in the student's embedding and in the teacher's.
        """
        # Text is compared from its beginning to its end, whatever part of it is learnt.
        rules = dataclasses.replace(rules, targets=TargetRules(("assistant",)))
        self._config, self._rules, self._teacher = config, rules, teacher
        questions, held_out = examples.questions, examples.held_out
        self._questions, self._held_out = questions, held_out or questions
        self._abilities, self._lengths, self._mesh = examples.abilities, lengths, mesh
        self._shared_vocab = shared_vocab
        self._greedy = Sampling(config.eval.max_new_tokens, temperature=0.0, top_p=1.0)
        self._prompts = functools.cache(rules.prompts)  # (student's, teacher's) of an example
        if self._held_out and not teacher.capabilities.on_policy:
            logging.warning(
                "the distance on the student's own text is not measured: the teacher cannot read it"
                " (%s)",
                teacher.capabilities.limits,
            )
        longest = config.data.max_length
        for example in (*questions, *held_out):
            _check_fits(example, max(map(len, self._prompts(example))), longest)
        asked = (*questions, *held_out, *examples.train)
        fitting = (e for e in asked if max(map(len, self._prompts(e))) < longest)
        self._shown = list(itertools.islice(fitting, SAMPLES))
        for named in (questions, *examples.abilities.values()):
            _check_questions(named)

    def ask_teacher(self) -> None:
        """Has the teacher write all that it will be asked for, and forgets it."""
        asked = [*self._held_out]
        if self._held_out is not self._questions:
            asked += self._questions
        if self._teacher.capabilities.samples:
            asked += self._shown
        rows, shown = self._config.eval.batch_size, self._config.log.progress_bar
        with progress.bar(len(asked), "evaluation", shown=shown) as bar:
            for start in range(0, len(asked), rows):
                bar.update(len(self._teacher_writes(asked[start : start + rows])))

    def before(self, base: Reader) -> dict:
        """Asks base and teacher -> {condition, "abilities" or "samples": what was found}."""
        result = {}
        if self._held_out:
            result["base"] = self._condition("base", base, view="student")
            result["prompted_base"] = self._condition("prompted_base", base, view="teacher")
            result["prompted_teacher"] = {"forward_kl": self._teacher_to_itself()}
        if self._questions:
            same = self._held_out is self._questions
            answers = self._teacher_answers if same else self._teacher_writes(self._questions)
            result["prompted_teacher"]["exact_match"] = self._exact_match(answers)
        samples = {"question": [example.turns[-1].content for example in self._shown]}
        samples["base"] = _texts(base, self._ask(base, self._shown, "samples"))
        if self._teacher.capabilities.samples:
            written = self._teacher_writes(self._shown)
            samples["prompted_teacher"] = [self._rules.teacher_chat.decode(t.ids) for t in written]
        return result | {"abilities": self._ask_abilities(base), "samples": samples}

    def after(self, student: Reader) -> dict:
        """Asks the trained student -> as `before`, with the one condition "student"."""
        result = {}
        if self._held_out:
            result["student"] = self._condition("student", student, view="student")
        samples = {"student": _texts(student, self._ask(student, self._shown, "samples"))}
        return result | {"abilities": self._ask_abilities(student), "samples": samples}

    def on_the_way(self, student: Reader) -> dict[str, float]:
        """The same on the first `eval.rows` prompts -> a line of eval.jsonl; {} if none is asked.

        For the teacher's text and the student's own: divergences, masses and rates by name, as in
        `losses.Agreement`, means over tokens.
        """
        found = {}
        held_out = self._held_out[: self._config.eval.rows]
        if not held_out:
            return found
        own = self._ask(student, held_out, "student's text")
        if self._questions:
            questions = self._questions[: self._config.eval.rows]
            asked = own if self._held_out is self._questions else None
            found["exact_match"] = self._exact_match(
                asked or self._ask(student, questions, "questions"), student.chat
            )
        texts = {"teacher_text": self._teacher_texts.first(len(held_out))}
        if self._teacher.capabilities.on_policy:
            texts["student_text"] = self._score(held_out, own)
        for text, scored in texts.items():
            means = self._agreement(student, scored, "student")._asdict()
            found |= {f"{text}/{name}": value for name, value in means.items()}
        return found

    def _condition(self, name: str, reader: Reader, view: str) -> dict[str, float]:
        agreement = self._agreement(reader, self._teacher_texts, view)
        found = {"forward_kl": agreement.forward_kl}
        if self._questions:
            answers = self._ask(reader, self._questions, name, view)
            found["exact_match"] = self._exact_match(answers, reader.chat)
        return found

    def _ask(
        self, reader: Reader, examples: Sequence[Example], what: str, view: str = "student"
    ) -> list[Trajectory]:
        prompts = [self._prompts(example)[view == "teacher"] for example in examples]
        return self._sample(reader, prompts, what)

    def _sample(self, reader: Reader, prompts: Sequence[np.ndarray], what: str):
        rows = self._config.eval.batch_size
        written: list[Trajectory] = []
        with progress.bar(len(prompts), what, shown=self._config.log.progress_bar) as bar:
            for start in range(0, len(prompts), rows):
                part = prompts[start : start + rows]
                written += reader.prefixes.sample(
                    part,
                    [0] * len(part),
                    self._greedy,
                    stop_ids=reader.chat.stop_ids,
                    batch_size=rows,
                    lengths=self._lengths,
                    mesh=self._mesh,
                    vocab_size=self._shared_vocab,
                )
                bar.update(len(part))
        return written

    def _ask_abilities(self, reader: Reader) -> dict[str, float]:
        result = {}
        for name, questions in self._abilities.items():
            prompts = [reader.chat.prompt_ids((*q.prefix, *q.turns), q.name) for q in questions]
            for question, prompt in zip(questions, prompts, strict=True):
                _check_fits(question, len(prompt), self._config.data.max_length)
            answers = _texts(reader, self._sample(reader, prompts, name))
            result[name] = _share_right(answers, questions)
        return result

    def _exact_match(self, answers: Sequence[Trajectory], chat: Chat | None = None) -> float:
        chat = chat or self._rules.teacher_chat
        texts = [chat.decode(answer.ids) for answer in answers]
        return _share_right(texts, self._questions[: len(texts)])

    def _teacher_writes(self, examples: Sequence[Example]) -> list[Trajectory]:
        prompts = [
            Prompt(example.name, self._prompts(example)[1], example.prefix + example.turns)
            for example in examples
        ]
        written = self._teacher.sample(prompts, [0] * len(prompts), self._greedy)
        unread = [e.name for e, t in zip(examples, written, strict=True) if not len(t.ids)]
        if unread:
            logging.warning(
                "evaluation: %d of the teacher's answers have no token, or one that is no id here;"
                " they are wrong answers, and no distance is taken on them: %s",
                *(len(unread), row_lengths.some(unread)),
            )
        return written

    def _teacher_to_itself(self) -> float:
        """Measured where the teacher is in this process: not 0 if a view or a shift were wrong.

        Only the answers of another teacher are known, whose distance to itself is 0 by definition.
        """
        if not isinstance(self._teacher, FlaxTeacher):
            return 0.0
        teacher = self._teacher
        itself = Reader(teacher.decoder, teacher.params, teacher.chat, teacher.prefixes)
        return self._agreement(itself, self._teacher_texts, "teacher").forward_kl

    @functools.cached_property
    def _teacher_answers(self) -> list[Trajectory]:
        """To all held-out prompts."""
        return self._teacher_writes(self._held_out)

    @functools.cached_property
    def _teacher_texts(self) -> Scored:
        return self._score(self._held_out, self._teacher_answers)

    @functools.cached_property
    def _shapes(self) -> list[pipeline.BatchShape]:
        """Of each batch of held-out rows, with room for the longest text that may be written.

        So they are the same for every text at every time, and compile once.
        """
        longest = Trajectory(np.zeros(self._greedy.max_new_tokens, np.int32), finished=False)
        needs = [
            shapes.longest([pipeline.shape_of(self._pair(example, longest)) for example in part])
            for part in self._in_batches(self._held_out)
        ]
        chain = shapes.choose(needs, self._config.data.bucket_lengths)
        return [pipeline.BatchShape(*shapes.smallest(chain, need)) for need in needs]

    def _in_batches(self, rows: Sequence) -> list[Sequence]:
        size = self._config.eval.batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _pair(self, example: Example, trajectory: Trajectory) -> ViewPair:
        if len(trajectory.ids) == 0:
            return self._blank(example, trajectory)
        # Of a conversation only the answer to its end is compared.
        example = dataclasses.replace(example, given=len(example.turns))
        return self._rules.pair(example, trajectory, too_long="truncate-right")[0]

    def _blank(self, example: Example, trajectory: Trajectory) -> ViewPair:
        """Of a response that a server could not tell in tokens of ours: nothing is compared."""
        none = np.zeros(0, np.int32)
        student, teacher = (View(prompt, none) for prompt in self._prompts(example))
        return ViewPair(example.name, example.row_id, student, teacher, none, trajectory.kept)

    def _score(self, examples: Sequence[Example], written: Sequence[Trajectory]) -> Scored:
        """What the teacher says of each text, read after its own view of the prompt."""
        rows = self._config.eval.batch_size
        pairs = [self._pair(*both) for both in zip(examples, written, strict=True)]
        if not any(len(pair.target_ids) for pair in pairs):
            raise UserError("none of the responses for the evaluation has a token to compare")
        batches = []
        for part, shape in zip(self._in_batches(pairs), self._shapes, strict=False):
            filled = part + part[-1:] * (rows - len(part))
            batch = pipeline.pad(filled, shape, self._rules.student_chat.pad_id)
            real_B1 = np.arange(rows)[:, None] < len(part)
            batch = dataclasses.replace(batch, target_mask_BN=batch.target_mask_BN & real_B1)
            kept = pipeline.kept_targets(filled, shape.targets)
            names = [pair.name for pair in filled]
            batches.append((batch, ask(self._teacher, batch, names, kept, self._mesh)))
        # A teacher elsewhere has been asked for all of them when the first one is waited for.
        return Scored([(batch, targets()) for batch, targets in batches], rows)

    def _agreement(self, reader: Reader, scored: Scored, view: str) -> losses.Agreement:
        return scoring.mean_agreement(reader, scored, view, self._config.gkd, self._mesh)


def recovery(base: float, prompted_teacher: float, student: float) -> float | None:
    """(student - base) / (prompted_teacher - base); None where the prefix changes nothing."""
    gap = prompted_teacher - base
    return None if gap == 0 else (student - base) / gap


def _texts(reader: Reader, answers: Sequence[Trajectory]) -> list[str]:
    return [reader.chat.decode(answer.ids) for answer in answers]


def _share_right(answers: Sequence[str], questions: Sequence[Example]) -> float:
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
