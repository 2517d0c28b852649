"""Did it work: answers, and the distance to the prompted teacher, under each condition.

| condition              | who answers        | what it reads                     |
|------------------------|--------------------|-----------------------------------|
| `base`                 | student, untrained | the student's view                |
| `prompted_base`        | student, untrained | prefix and turns                  |
| `prompted_teacher`     | teacher            | prefix and turns                  |
| `student`              | student, trained   | the student's view                |
| `reprompted_student`   | student, trained   | prefix and turns                  |
| `student_other_prefix` | student, trained   | `eval.other_prefix` and the turns |

Texts and answers are greedy: the same at every time, but for what the student has learnt.
"""

import copy
import itertools
from collections.abc import Sequence

import numpy as np
from absl import logging
from jax.sharding import Mesh

from gkdjax.config import Config
from gkdjax.data.dataset import DistillDataset
from gkdjax.data.load import Examples
from gkdjax.data.views import ViewRules
from gkdjax.evaluation import prefix_cost, scoring
from gkdjax.evaluation.answering import Answering
from gkdjax.evaluation.heldout import SideEffects, Validation, unavailable
from gkdjax.evaluation.scoring import EvalModel, ScoredText
from gkdjax.evaluation.texts import Texts, check_fits
from gkdjax.teachers.base import Teacher, hooks
from gkdjax.teachers.local import LocalTeacher
from gkdjax.types import Completion, Example, Message
from gkdjax.utils import text as utils_text

SAMPLES = 3  # answers that are shown side by side
_ACCURACY = {"questions": "accuracy", "heldout": "heldout_accuracy"}
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
        validation: DistillDataset | None,
        lengths: Sequence[int],
        mesh: Mesh,
        shared_vocab: int,
        untrained: LocalTeacher | None = None,
    ):
        """Renders every prompt once.

        Args:
          config: the run's.
          rules: how a question becomes a teacher's and a student's view.
          teacher: reads the prefix.
          examples: samples are answers to what is asked, or else to what is trained.
          validation: rows whose loss is measured; see `with_validation`.
          lengths: padded prompt lengths for sampling.
          mesh: of the run.
          shared_vocab: ids below it have a row in the student's embedding and in the teacher's.
          untrained: the student as it was; None where no side effects are measured.
        """
        self._config, self._chat, self._teacher = config, rules.student_chat, teacher
        self._lengths, self._mesh, self._shared_vocab = lengths, mesh, shared_vocab
        self._sets = {"questions": examples.questions, "heldout": examples.heldout}
        self._sets = {name: rows for name, rows in self._sets.items() if rows}
        self._abilities = examples.retention
        self._other = tuple(Message(**message) for message in config.eval.other_prefix)
        self._texts = Texts(config, rules, teacher, examples.prompts, mesh)
        greedy = self._texts.greedy
        self._answering = Answering(config, self._chat, greedy, lengths, mesh, shared_vocab)
        self._validation = None
        if validation is not None:
            self._validation = Validation(validation, config, teacher, mesh)
        self._side_effects = SideEffects.of(untrained, config, rules, examples.side_effects, mesh)
        self._asked = list(dict.fromkeys(itertools.chain(examples.prompts, *self._sets.values())))
        views = map(self._texts.prompts, self._asked)
        self._baked = any(not np.array_equal(bare, whole) for bare, whole in views)
        self._unavailable = unavailable(config, teacher, examples, self._baked, self._validation)
        for measure, why in self._unavailable.items():
            logging.info("not measured: %s (%s)", measure, why)
        self._check_lengths()
        shown = (*self._asked, *examples.train)
        fitting = (e for e in shown if self._longest_view(e) < config.data.max_length)
        self._shown = list(itertools.islice(dict.fromkeys(fitting), SAMPLES))

    def with_validation(self, dataset: DistillDataset) -> "Evaluation":
        """The same with the rows whose loss is measured as they are once they have their text."""
        new = copy.copy(self)
        new._validation = Validation(dataset, self._config, self._teacher, self._mesh)
        return new

    def ask_teacher(self) -> None:
        """Has the teacher say all that it will be asked for, and forgets it."""
        asked = dict.fromkeys(self._asked)
        if self._teacher.capabilities.samples:
            asked |= dict.fromkeys(self._shown)
        asked, rows = list(asked), self._config.eval.batch_size
        with utils_text.bar(len(asked), "evaluation", shown=self._config.log.progress_bar) as bar:
            for start in range(0, len(asked), rows):
                bar.update(len(self._texts.written_by_teacher(asked[start : start + rows])))
        if self._validation is not None:
            self._validation.ask_teacher()

    def before(self, base: EvalModel) -> dict:
        """Asks base and teacher -> what RUN/before.json holds.

        That is {condition: measures}, and beside them "abilities", "samples", "answers", what is
        "unavailable" and why, and how many questions there are ("counts").
        """
        found: dict = {"answers": []}
        for name, view in {"base": "student", "prompted_base": "teacher"}.items():
            self._condition(name, base, view, found)
        self._prompted_teacher(found)
        samples = {"question": [example.turns[-1].content for example in self._shown]}
        samples["base"] = self.samples(base)
        samples["prompted_base"] = self.samples(base, "teacher")
        if self._teacher.capabilities.samples:
            written = self._texts.written_by_teacher(self._shown)
            samples["prompted_teacher"] = self._answering.texts(self._teacher, written)
        sets = {**self._sets, **self._abilities}
        return found | {
            "abilities": self._ask_abilities(base, "base", found),
            "samples": samples,
            "counts": {name: len(questions) for name, questions in sets.items()},
            "unavailable": self._unavailable,
        }

    def after(self, student: EvalModel) -> dict:
        """Asks the trained student -> as `before`, and "side_effects" and "prefix_cost"."""
        found: dict = {"answers": []}
        views = {"student": "student"}
        views |= {"reprompted_student": "teacher"} if self._baked else {}
        views |= {"student_other_prefix": "other"} if self._other else {}
        for name, view in views.items():
            self._condition(name, student, view, found)
        found["samples"] = {name: self.samples(student, view) for name, view in views.items()}
        found["abilities"] = self._ask_abilities(student, "student", found)
        if self._side_effects is not None:
            found["side_effects"] = self._side_effects.of_student(student)
        if self._baked:
            found["prefix_cost"] = self._prefix_cost(student)
        return found

    def on_the_way(self, student: EvalModel) -> dict[str, float]:
        """The same on the first `eval.rows` prompts -> a line of eval.jsonl; {} if none is asked.

        For the teacher's text and the student's own: divergences, masses and rates by name, as in
        `losses.Agreement`, and perplexities; for the rows of data.validation the loss, too.
        """
        found, rows = {}, self._config.eval.rows
        prompts = self._texts.examples[:rows]
        own = self._ask(student, prompts, "student", "student's text") if prompts else []
        if "questions" in self._sets:
            questions = self._sets["questions"][:rows]
            same = self._texts.examples is self._sets["questions"]
            answers = own if same else self._ask(student, questions, "student", "questions")
            judged = self._answering.judge("questions", "student", student, questions, answers)
            found["accuracy"] = judged.accuracy
        for text, scored in self._scored(own).items():
            means = self._agreement(student, scored, "student")
            found |= {f"{text}/{name}": value for name, value in means.items()}
        if self._validation is not None:
            means = self._validation.of_student(student)
            found |= {f"validation/{name}": value for name, value in means.items()}
        if self._side_effects is not None:
            means = self._side_effects.of_student(student, rows)
            found |= {f"side_effects/{name}": value for name, value in means.items()}
        return found

    def samples(self, reader: EvalModel, view: str = "student") -> list[str]:
        """Its answers to the questions that are shown."""
        return self._answering.texts(reader, self._ask(reader, self._shown, view, "samples"))

    def _scored(self, own: Sequence[Completion]) -> dict[str, ScoredText]:
        """The teacher's text of the first prompts and the student's own, where it can be read."""
        if not own:
            return {}
        found = {"teacher_text": self._texts.teacher_text.first(len(own))}
        if self._teacher.capabilities.on_policy:
            found["student_text"] = self._texts.score(own)
        return found

    def _condition(self, name: str, reader: EvalModel, view: str, found: dict) -> None:
        """Adds its measures and answers to `found`; nothing if nothing is asked."""
        measures = {}
        for of, questions in self._sets.items():
            answers = self._ask(reader, questions, view, f"{name}, {of}")
            measures |= self._judged(of, name, reader, questions, answers, found)
        if self._texts.examples:
            text, read = self._texts.teacher_text, view
            if view == "other":
                text, read = self._texts.under_prefix(self._other), "student"
            measures |= self._agreement(reader, text, read)
        if measures:
            found[name] = measures

    def _prompted_teacher(self, found: dict) -> None:
        measures, texts = {}, self._texts
        for of, questions in self._sets.items():
            same = questions is texts.examples
            answers = texts.teachers if same else texts.written_by_teacher(questions)
            who = of, "prompted_teacher", self._teacher
            measures |= self._judged(*who, questions, answers, found)
        if texts.examples:
            measures |= self._teacher_to_itself()
        if measures:
            found["prompted_teacher"] = measures

    def _teacher_to_itself(self) -> dict[str, float]:
        """Measured where the teacher is in this process: not 0 if a view or a shift were wrong.

        Only the answers of another teacher are known, whose distance to itself is 0 by definition.
        """
        teacher = hooks(self._teacher).weights
        if teacher is None:
            return _BY_DEFINITION | scoring.own_perplexity(self._texts.teacher_text)
        itself = EvalModel(teacher.decoder, teacher.params, teacher.chat, teacher.prefixes)
        return self._agreement(itself, self._texts.teacher_text, "teacher")

    def _judged(self, of: str, condition: str, who, questions, answers, found: dict) -> dict:
        judged = self._answering.judge(of, condition, who, questions, answers)
        found["answers"] += judged.lines
        return {_ACCURACY[of]: judged.accuracy}

    def _ask_abilities(self, reader: EvalModel, condition: str, found: dict) -> dict[str, float]:
        result = {}
        for name, questions in self._abilities.items():
            prompts = [self._chat.prompt_ids(q.turns, q.name, q.tools) for q in questions]
            answers = self._answering.ask(reader, prompts, name)
            judged = self._answering.judge(name, condition, reader, questions, answers)
            found["answers"] += judged.lines
            result[name] = judged.accuracy
        return result

    def _prefix_cost(self, student: EvalModel) -> dict:
        pairs = [self._texts.prompts(example) for example in self._asked]
        saved = np.mean([len(whole) - len(bare) for bare, whole in pairs])
        first = self._asked[0].prefix
        of_one = [p for p, e in zip(pairs, self._asked, strict=True) if e.prefix == first]
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

    def _check_lengths(self) -> None:
        longest = self._config.data.max_length
        for example in self._asked:
            check_fits(example, self._longest_view(example), longest)
        for question in itertools.chain(*self._abilities.values()):
            prompt = self._chat.prompt_ids(question.turns, question.name, question.tools)
            check_fits(question, len(prompt), longest)

    def _longest_view(self, example: Example) -> int:
        views = ("student", "teacher", "other") if self._other else ("student", "teacher")
        return max(len(self._prompt(example, view)) for view in views)

    def _prompt(self, example: Example, view: str) -> np.ndarray:
        if view == "other":
            name = f"{example.name} under eval.other_prefix"
            return self._chat.prompt_ids(self._other + example.turns, name, example.tools)
        return self._texts.prompts(example)[view == "teacher"]

    def _ask(
        self, reader: EvalModel, examples: Sequence[Example], view: str, what: str
    ) -> list[Completion]:
        prompts = [self._prompt(example, view) for example in examples]
        return self._answering.ask(reader, prompts, what)

    def _agreement(self, reader: EvalModel, scored: ScoredText, view: str) -> dict[str, float]:
        return scoring.mean_agreement(reader, scored, view, self._config.gkd, self._mesh)
