"""Did it work: answers, and the distance to the prompted teacher, under each condition.

| condition              | who answers        | what it reads                    |
|------------------------|--------------------|----------------------------------|
| `base`                 | student, untrained | the student's view               |
| `prompted_base`        | student, untrained | prefix and turns                 |
| `prompted_teacher`     | teacher            | prefix and turns                 |
| `student`              | student, trained   | the student's view               |
| `reprompted_student`   | student, trained   | prefix and turns                 |
| `student_other_prefix` | student, trained   | `eval.other_prefix` and the turns |

Texts and answers are greedy: the same at every time, but for what the student has learnt.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from gkdjax import progress
from gkdjax.config import Config
from gkdjax.data.answers import is_right
from gkdjax.data.views import ViewRules
from gkdjax.evaluation import prefix_cost, scoring
from gkdjax.evaluation.availability import unavailable
from gkdjax.evaluation.checks import check_fits
from gkdjax.evaluation.scoring import Reader, Scored
from gkdjax.evaluation.side_effects import SideEffects
from gkdjax.evaluation.texts import Texts
from gkdjax.evaluation.validation import Validation
from gkdjax.examples_of_run import Examples
from gkdjax.feed import Feed
from gkdjax.teachers.flax import FlaxTeacher
from gkdjax.teachers.protocol import Teacher
from gkdjax.types import Example, Message, Trajectory

SAMPLES = 3  # answers that are shown side by side
_BY_DEFINITION = {"forward_kl": 0.0, "reverse_kl": 0.0}
_BY_DEFINITION |= {"top1_agreement": 1.0, "acceptance_rate": 1.0}


class Evaluation:
    """What is asked of the base before training, of the student on the way, and after it."""

    def __init__(
        self,
        config: Config,
        rules: ViewRules,
        teacher: Teacher,
        examples: Examples,
        validation: Feed | None,
        lengths: Sequence[int],
        mesh: Mesh,
        shared_vocab: int,
        untrained: FlaxTeacher | None = None,
    ):
        """Renders every prompt once.

        Args:
          config: the run's.
          rules: how a question becomes a teacher's and a student's view.
          teacher: reads the prefix.
          examples: samples are answers to what is asked, or else to what is trained.
          validation: rows whose loss is measured, prepared before they are.
          lengths: padded prompt lengths for sampling.
          mesh: of the run.
          shared_vocab: ids below it have a row in the student's embedding and in the teacher's.
          untrained: the student as it was; None where no side effects are measured.
        """
        self._config, self._chat, self._teacher = config, rules.student_chat, teacher
        self._lengths, self._mesh, self._shared_vocab = lengths, mesh, shared_vocab
        self._sets = {"questions": examples.questions, "heldout": examples.heldout}
        self._abilities = examples.abilities
        self._other = tuple(Message(**message) for message in config.eval.other_prefix)
        self.texts = Texts(config, rules, teacher, examples.prompts, mesh)
        self._validation = Validation.of(validation, config, teacher, mesh)
        self._side_effects = SideEffects.of(untrained, config, rules, examples.side_effects, mesh)
        asked = (*examples.questions, *examples.heldout, *examples.prompts)
        self._baked = any(len({*map(bytes, self.texts.prompts(e))}) > 1 for e in asked)
        self._unavailable = unavailable(config, teacher, examples, self._baked, self._validation)
        longest = config.data.max_length
        for example in asked:
            for view in self._views:
                check_fits(example, len(self._prompt(example, view)), longest)
        asked = (*asked, *examples.train)
        fitting = (e for e in asked if max(map(len, self.texts.prompts(e))) < longest)
        self.shown = list(itertools.islice(dict.fromkeys(fitting), SAMPLES))

    @property
    def _views(self) -> tuple[str, ...]:
        return ("student", "teacher", "other") if self._other else ("student", "teacher")

    def ask_teacher(self) -> None:
        """Has the teacher say all that it will be asked for, and forgets it."""
        asked = dict.fromkeys(itertools.chain(self.texts.examples, *self._sets.values()))
        if self._teacher.capabilities.samples:
            asked |= dict.fromkeys(self.shown)
        asked, rows = list(asked), self._config.eval.batch_size
        with progress.bar(len(asked), "evaluation", shown=self._config.log.progress_bar) as bar:
            for start in range(0, len(asked), rows):
                bar.update(len(self.texts.written_by_teacher(asked[start : start + rows])))
        if self._validation is not None:
            self._validation.ask_teacher()

    def before(self, base: Reader) -> dict:
        """Asks base and teacher -> what RUN/before.json holds.

        That is {condition: measures}, and beside them "abilities", "samples", "answers", and what
        was "unavailable", by name; and how many were asked ("counts").
        """
        found: dict = {"answers": []}
        found["base"] = self._condition("base", base, "student", found)
        found["prompted_base"] = self._condition("prompted_base", base, "teacher", found)
        found["prompted_teacher"] = self._prompted_teacher(found)
        found = {name: value for name, value in found.items() if value != {}}
        samples = {"question": [example.turns[-1].content for example in self.shown]}
        samples["base"] = self.samples(base)
        samples["prompted_base"] = self._texts(base, self.shown, "teacher", "samples")
        if self._teacher.capabilities.samples:
            written = self.texts.written_by_teacher(self.shown)
            samples["prompted_teacher"] = [self._decode(self._teacher, t) for t in written]
        sets = {**self._sets, **self._abilities}
        return found | {
            "abilities": self._ask_abilities(base, "base", found),
            "samples": samples,
            "counts": {name: len(questions) for name, questions in sets.items() if questions},
            "unavailable": self._unavailable,
        }

    def after(self, student: Reader) -> dict:
        """Asks the trained student -> as `before`, and "side_effects" and "prefix_cost"."""
        found: dict = {"answers": []}
        found["student"] = self._condition("student", student, "student", found)
        samples = {"student": self.samples(student)}
        views = {"reprompted_student": "teacher"} if self._baked else {}
        views |= {"student_other_prefix": "other"} if self._other else {}
        for name, view in views.items():
            found[name] = self._condition(name, student, view, found)
            samples[name] = self._texts(student, self.shown, view, "samples")
        found = {name: value for name, value in found.items() if value != {}}
        found["abilities"] = self._ask_abilities(student, "student", found)
        found["samples"] = samples
        if self._side_effects is not None:
            found["side_effects"] = self._side_effects.of_student(student)
        if self._baked:
            found["prefix_cost"] = self._prefix_cost(student)
        return found

    def on_the_way(self, student: Reader) -> dict[str, float]:
        """The same on the first `eval.rows` prompts -> a line of eval.jsonl; {} if none is asked.

        For the teacher's text and the student's own: divergences, masses and rates by name, as in
        `losses.Agreement`, and perplexities; for the rows of data.validation the loss, too.
        """
        found, rows = {}, self._config.eval.rows
        prompts, questions = self.texts.examples[:rows], self._sets["questions"][:rows]
        own = self._ask(student, prompts, "student", "student's text") if prompts else []
        if questions:
            same = self.texts.examples is self._sets["questions"]
            answers = own if same else self._ask(student, questions, "student", "questions")
            right = self._right(student, questions, answers)
            found["accuracy"] = sum(right) / len(right)
        texts: dict[str, Scored] = {}
        if prompts:
            texts["teacher_text"] = self.texts.teacher_text.first(len(prompts))
            if self._teacher.capabilities.on_policy:
                texts["student_text"] = self.texts.score(own)
        for text, scored in texts.items():
            means = self._agreement(student, scored, "student")
            found |= {f"{text}/{name}": value for name, value in means.items()}
        if self._validation is not None:
            means = self._validation.of_student(student)
            found |= {f"validation/{name}": value for name, value in means.items()}
        if self._side_effects is not None:
            means = self._side_effects.of_student(student, rows)
            found |= {f"side_effects/{name}": value for name, value in means.items()}
        return found

    def samples(self, reader: Reader) -> list[str]:
        """Its answers to the questions that are shown."""
        return self._texts(reader, self.shown, "student", "samples")

    def _condition(self, name: str, reader: Reader, view: str, found: dict) -> dict[str, float]:
        """Measures by name; {} if nothing is asked. Answers are added to `found`."""
        measures = {}
        for of, questions in self._sets.items():
            if questions:
                answers = self._ask(reader, questions, view, f"{name}, {of}")
                measures |= self._judged(of, name, reader, questions, answers, found)
        if self.texts.examples:
            text, read = self.texts.teacher_text, view
            if view == "other":
                text, read = self.texts.under_prefix(self._other), "student"
            measures |= self._agreement(reader, text, read)
        return measures

    def _prompted_teacher(self, found: dict) -> dict[str, float]:
        measures = {}
        for of, questions in self._sets.items():
            if questions:
                same = questions is self.texts.examples
                answers = self.texts.teachers if same else self.texts.written_by_teacher(questions)
                measures |= self._judged(
                    of, "prompted_teacher", self._teacher, questions, answers, found
                )
        return measures | (self._teacher_to_itself() if self.texts.examples else {})

    def _teacher_to_itself(self) -> dict[str, float]:
        """Measured where the teacher is in this process: not 0 if a view or a shift were wrong.

        Only the answers of another teacher are known, whose distance to itself is 0 by definition.
        """
        if not isinstance(self._teacher, FlaxTeacher):
            return _BY_DEFINITION | scoring.own_perplexity(self.texts.teacher_text)
        teacher = self._teacher
        itself = Reader(teacher.decoder, teacher.params, teacher.chat, teacher.prefixes)
        return self._agreement(itself, self.texts.teacher_text, "teacher")

    def _judged(
        self,
        of: str,
        condition: str,
        who: Reader | Teacher,
        questions: Sequence[Example],
        answers: Sequence[Trajectory],
        found: dict,
    ) -> dict[str, float]:
        """{"accuracy" or "heldout_accuracy": share of right ones}; adds each answer to `found`."""
        right = self._right(who, questions, answers)
        texts = [self._decode(who, answer) for answer in answers]
        found["answers"] += [
            _line(of, condition, *one) for one in zip(questions, texts, right, strict=True)
        ]
        name = "accuracy" if of == "questions" else f"{of}_accuracy"
        return {name: sum(right) / len(right)}

    def _ask_abilities(self, reader: Reader, condition: str, found: dict) -> dict[str, float]:
        result = {}
        for name, questions in self._abilities.items():
            answers = self._sample(reader, self._ability_prompts(questions), name)
            judged = self._judged(name, condition, reader, questions, answers, found)
            result[name] = judged[f"{name}_accuracy"]
        return result

    def _ability_prompts(self, questions: Sequence[Example]) -> list[np.ndarray]:
        prompts = [self._chat.prompt_ids(q.turns, q.name) for q in questions]
        for question, prompt in zip(questions, prompts, strict=True):
            check_fits(question, len(prompt), self._config.data.max_length)
        return prompts

    def _prefix_cost(self, student: Reader) -> dict:
        asked = dict.fromkeys(itertools.chain(self.texts.examples, *self._sets.values()))
        prompts = [self.texts.prompts(example) for example in asked]
        saved = np.mean([len(whole) - len(bare) for bare, whole in prompts])
        first = next(iter(asked)).prefix
        of_one = [self.texts.prompts(e) for e in asked if e.prefix == first]
        found = prefix_cost.measure(
            student,
            prefix_cost.Asked(*zip(*of_one, strict=True)),
            new_tokens=self._config.eval.max_new_tokens,
            batch_size=self._config.eval.batch_size,
            lengths=self._lengths,
            mesh=self._mesh,
            vocab_size=self._shared_vocab,
            prefix_bytes=self._config.teacher.prefix_bytes,
        )
        return {"tokens_saved": float(saved), **found}

    def _prompt(self, example: Example, view: str) -> np.ndarray:
        if view == "other":
            return self._chat.prompt_ids(
                self._other + example.turns, f"{example.name} under eval.other_prefix"
            )
        return self.texts.prompts(example)[view == "teacher"]

    def _texts(self, reader: Reader, examples: Sequence[Example], view: str, what: str):
        return [self._decode(reader, answer) for answer in self._ask(reader, examples, view, what)]

    def _ask(
        self, reader: Reader, examples: Sequence[Example], view: str, what: str
    ) -> list[Trajectory]:
        return self._sample(reader, [self._prompt(example, view) for example in examples], what)

    def _sample(self, reader: Reader, prompts: Sequence[np.ndarray], what: str):
        rows = self._config.eval.batch_size
        written: list[Trajectory] = []
        with progress.bar(len(prompts), what, shown=self._config.log.progress_bar) as bar:
            for start in range(0, len(prompts), rows):
                part = prompts[start : start + rows]
                written += reader.prefixes.sample(
                    part,
                    [0] * len(part),
                    self.texts.greedy,
                    stop_ids=reader.chat.stop_ids,
                    batch_size=rows,
                    lengths=self._lengths,
                    mesh=self._mesh,
                    vocab_size=self._shared_vocab,
                )
                bar.update(len(part))
        return written

    def _right(
        self, who: Reader | Teacher, questions: Sequence[Example], answers: Sequence[Trajectory]
    ) -> list[bool]:
        pairs = zip(answers, questions, strict=True)
        return [is_right(self._decode(who, answer), q.expected) for answer, q in pairs]

    def _decode(self, who: Reader | Teacher, answer: Trajectory) -> str:
        return (who.chat or self._chat).decode(answer.ids)

    def _agreement(self, reader: Reader, scored: Scored, view: str) -> dict[str, float]:
        return scoring.mean_agreement(reader, scored, view, self._config.gkd, self._mesh)


def recovery(base: float, prompted_teacher: float, student: float) -> float | None:
    """(student - base) / (prompted_teacher - base); None where the prefix changes nothing."""
    gap = prompted_teacher - base
    return None if gap == 0 else (student - base) / gap


def _line(of: str, condition: str, question: Example, answer: str, right: bool) -> dict:
    """Of RUN/answers.jsonl."""
    return {
        "set": of,
        "condition": condition,
        "name": question.name,
        "question": question.turns[-1].content,
        "expected": list(question.expected.any_of),
        "match": question.expected.match,
        "answer": answer,
        "right": right,
    }
