"""Measures answers, and the distance to the prompted teacher, under each condition.

| condition              | who answers        | what it reads                     |
|------------------------|--------------------|-----------------------------------|
| `base`                 | student, untrained | the student's view                |
| `prompted_base`        | student, untrained | prefix and turns                  |
| `prompted_teacher`     | teacher            | prefix and turns                  |
| `student`              | student, trained   | the student's view                |
| `reprompted_student`   | student, trained   | prefix and turns                  |
| `student_other_prefix` | student, trained   | `eval.other_prefix` and the turns |

Texts and answers are greedy, so only what the student has learnt changes them.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
from absl import logging
from jax.sharding import Mesh

from gkdjax.config import Config
from gkdjax.data.answer_matching import is_right
from gkdjax.data.dataset import DistillDataset
from gkdjax.data.load import Examples
from gkdjax.data.views import ViewRules
from gkdjax.evaluation import prefix_cost, scoring
from gkdjax.evaluation.scoring import EvalModel, ScoredText
from gkdjax.evaluation.texts import Texts, score_dataset
from gkdjax.teachers.base import Teacher, hooks
from gkdjax.teachers.local import LocalTeacher
from gkdjax.types import Completion, Example, Message
from gkdjax.utils import text as utils_text
from gkdjax.utils.errors import UserError

SAMPLES = 3  # answers that are shown side by side
_ACCURACY = {"questions": "accuracy", "heldout": "heldout_accuracy"}
_TO_ITSELF = {"forward_kl": 0.0, "reverse_kl": 0.0, "top1_agreement": 1.0, "acceptance_rate": 1.0}

_OF_THE_REST = {
    "bucket": "with the rest as one, KL is a lower bound and acceptance an upper one",
    "renormalize": "what is outside of them counts for nothing (gkd.tail = 'renormalize')",
}


class Evaluation:
    """Asks the base before training, the student on the way, and the student after training."""

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
          config, rules, teacher, examples, mesh: of the run.
          validation: rows whose loss is measured; see `with_validation`.
          lengths: padded prompt lengths for sampling.
          shared_vocab: ids below it have a row in the student's embedding and in the teacher's.
          untrained: the student as it was; None: no side effects are measured.
        """
        self._config, self._chat, self._teacher = config, rules.student_chat, teacher
        self._mesh, self._validation = mesh, validation
        self._sampling = {"lengths": lengths, "mesh": mesh, "vocab_size": shared_vocab}
        self._sets = {"questions": examples.questions, "heldout": examples.heldout}
        self._sets = {name: rows for name, rows in self._sets.items() if rows}
        self._retention = examples.retention
        self._other = tuple(Message(**message) for message in config.eval.other_prefix)
        self._texts = Texts(config, rules, teacher, examples.prompts, mesh)
        self._unrelated = None  # the untrained student's text; nobody reads a prefix there
        if untrained is not None and examples.side_effects:
            bare = dataclasses.replace(rules, teacher_chat=rules.student_chat, retained=0)
            self._unrelated = Texts(config, bare, untrained, examples.side_effects, mesh)
        self._asked = list(dict.fromkeys(itertools.chain(examples.prompts, *self._sets.values())))
        views = map(self._texts.prompts, self._asked)
        self._baked = any(not np.array_equal(bare, whole) for bare, whole in views)
        self._unavailable = unavailable(
            config, teacher, examples, self._baked, validation is not None
        )
        for measure, why in self._unavailable.items():
            logging.info("not measured: %s (%s)", measure, why)
        self._check_lengths()
        fitting = (
            example
            for example in (*self._asked, *examples.train)
            if self._longest_view(example) < config.data.max_length
        )
        self._shown = list(itertools.islice(dict.fromkeys(fitting), SAMPLES))

    @functools.cached_property
    def _validation_text(self) -> ScoredText:
        return score_dataset(self._validation, self._config, self._teacher, self._mesh)

    def with_validation(self, dataset: DistillDataset) -> "Evaluation":
        """Returns the same with the rows whose loss is measured, once they have their text."""
        new = copy.copy(self)
        new._validation = dataset
        new.__dict__.pop("_validation_text", None)
        return new

    def _check_lengths(self) -> None:
        sizes = [(example, self._longest_view(example)) for example in self._asked]
        unrelated = [] if self._unrelated is None else self._unrelated.examples
        for example in itertools.chain(*self._retention.values(), unrelated):
            sizes.append((example, len(self._prompt(example, "bare"))))
        for example, length in sizes:
            if length >= self._config.data.max_length:
                raise UserError(
                    f"{example.name}: the question has {length} tokens with its prefix and leaves"
                    f" no room in data.max_length = {self._config.data.max_length}; raise it"
                )

    def _longest_view(self, example: Example) -> int:
        views = ("student", "teacher", "other") if self._other else ("student", "teacher")
        return max(len(self._prompt(example, view)) for view in views)

    def _prompt(self, example: Example, view: str) -> np.ndarray:
        """The prompt as "student" or "teacher" read it, after the "other" prefix, or "bare"."""
        if view in ("other", "bare"):
            prefix = self._other if view == "other" else ()
            name = example.name + (" under eval.other_prefix" if prefix else "")
            return self._chat.prompt_ids(prefix + example.turns, name, example.tools)
        return self._texts.prompts(example)[view == "teacher"]

    def ask_teacher(self) -> None:
        """Has the teacher write and score everything that it will be asked for."""
        asked = dict.fromkeys(self._asked)
        if self._teacher.capabilities.samples:
            asked |= dict.fromkeys(self._shown)
        asked, rows = list(asked), self._config.eval.batch_size
        with utils_text.bar(len(asked), "evaluation", shown=self._config.log.progress_bar) as bar:
            for start in range(0, len(asked), rows):
                bar.update(len(self._texts.written_by_teacher(asked[start : start + rows])))
        if self._validation is not None:
            _ = self._validation_text

    def before(self, base: EvalModel) -> dict:
        """Asks base and teacher -> the content of RUN/before.json.

        It has {condition: measures}, "abilities", "samples", "answers", what is "unavailable" and
        why, and how many questions there are ("counts").
        """
        found: dict = {"answers": []}
        self._condition("base", base, "student", found)
        self._condition("prompted_base", base, "teacher", found)
        self._condition("prompted_teacher", self._teacher, "teacher", found)
        samples = {"question": [example.turns[-1].content for example in self._shown]}
        samples |= {"base": self.samples(base), "prompted_base": self.samples(base, "teacher")}
        if self._teacher.capabilities.samples:
            written = self._texts.written_by_teacher(self._shown)
            samples["prompted_teacher"] = self._decoded(self._teacher, written)
        sets = {**self._sets, **self._retention}
        return found | {
            "abilities": self._retained(base, "base", found),
            "samples": samples,
            "counts": {name: len(questions) for name, questions in sets.items()},
            "unavailable": self._unavailable,
        }

    def after(self, student: EvalModel) -> dict:
        """Asks the trained student -> like `before`, and "side_effects" and "prefix_cost"."""
        found: dict = {"answers": []}
        views = {"student": "student"}
        views |= {"reprompted_student": "teacher"} if self._baked else {}
        views |= {"student_other_prefix": "other"} if self._other else {}
        for name, view in views.items():
            self._condition(name, student, view, found)
        found["samples"] = {name: self.samples(student, view) for name, view in views.items()}
        found["abilities"] = self._retained(student, "student", found)
        if self._unrelated is not None:
            found["side_effects"] = self._agreement(student, self._unrelated.teacher_text)
        if self._baked:
            found["prefix_cost"] = self._prefix_cost(student)
        return found

    def on_the_way(self, student: EvalModel) -> dict[str, float]:
        """Asks the student the first `eval.rows` prompts -> a line of eval.jsonl; {} without any.

        The names are those of `losses.Agreement` and "perplexity" after "teacher_text/",
        "student_text/", "side_effects/" and "validation/", which has the "loss", too.
        """
        found, rows = {}, self._config.eval.rows
        prompts = self._texts.examples[:rows]
        own = self._ask(student, prompts, "student", "student's text") if prompts else []
        if "questions" in self._sets:
            questions = self._sets["questions"][:rows]
            same = self._texts.examples is self._sets["questions"]
            answers = own if same else self._ask(student, questions, "student", "questions")
            found["accuracy"], _ = self._judged("questions", "student", student, questions, answers)
        texts = {"teacher_text": self._texts.teacher_text.first(len(own))} if own else {}
        if own and self._teacher.capabilities.on_policy:
            texts["student_text"] = self._texts.score(own)
        if self._validation is not None:
            text = texts["validation"] = self._validation_text
            loss = scoring.loss(student, text, self._config.gkd, self._mesh)
            found["validation/loss"] = loss
        if self._unrelated is not None:
            text = self._unrelated.teacher_text
            texts["side_effects"] = text if rows is None else text.first(rows)
        for name, text in texts.items():
            means = self._agreement(student, text)
            found |= {f"{name}/{measure}": value for measure, value in means.items()}
        return found

    def samples(self, model: EvalModel, view: str = "student") -> list[str]:
        """Returns the model's answers to the questions that are shown."""
        return self._decoded(model, self._ask(model, self._shown, view, "samples"))

    def _condition(self, name: str, who: EvalModel | Teacher, view: str, found: dict) -> None:
        """Adds a condition's measures and answers to `found`, if anything is asked."""
        measures, texts = {}, self._texts
        for key, questions in self._sets.items():
            if who is not self._teacher:
                answers = self._ask(who, questions, view, f"{name}, {key}")
            elif questions is texts.examples:
                answers = texts.teachers
            else:
                answers = texts.written_by_teacher(questions)
            measures[_ACCURACY[key]], lines = self._judged(key, name, who, questions, answers)
            found["answers"] += lines
        model = who if who is not self._teacher else hooks(who).weights
        if texts.examples and model is None:
            # Only the answers of such a teacher are known; its distance to itself is 0.
            measures |= _TO_ITSELF | scoring.own_perplexity(texts.teacher_text)
        elif texts.examples:  # a teacher's distance to itself shows that views and shift are right
            other = view == "other"
            text = texts.under_prefix(self._other) if other else texts.teacher_text
            measures |= self._agreement(model, text, "student" if other else view)
        if measures:
            found[name] = measures

    def _retained(self, model: EvalModel, condition: str, found: dict) -> dict[str, float]:
        """Accuracy on each retention set; adds the answers to `found`."""
        result = {}
        for name, questions in self._retention.items():
            answers = self._ask(model, questions, "bare", name)
            result[name], lines = self._judged(name, condition, model, questions, answers)
            found["answers"] += lines
        return result

    def _prefix_cost(self, student: EvalModel) -> dict:
        pairs = [self._texts.prompts(example) for example in self._asked]
        saved = np.mean([len(whole) - len(bare) for bare, whole in pairs])
        first = self._asked[0].prefix
        of_one = [p for p, e in zip(pairs, self._asked, strict=True) if e.prefix == first]
        found = prefix_cost.measure(
            student,
            *zip(*of_one, strict=True),
            new_tokens=self._config.eval.max_new_tokens,
            prefix_bytes=self._config.teacher.prefix_bytes,
            batch_size=self._config.eval.batch_size,
            **self._sampling,
        )
        return {"tokens_saved": float(saved), **found}

    def _ask(
        self, model: EvalModel, examples: Sequence[Example], view: str, what: str
    ) -> list[Completion]:
        """A model's answers to one view of each example; `what` stands at the progress bar."""
        prompts = [self._prompt(example, view) for example in examples]
        rows, written = self._config.eval.batch_size, []
        how = {"stop_ids": model.chat.stop_ids, "batch_size": rows, **self._sampling}
        with utils_text.bar(len(prompts), what, shown=self._config.log.progress_bar) as bar:
            for start in range(0, len(prompts), rows):
                part = prompts[start : start + rows]
                seeds = [0] * len(part)
                written += model.prefixes.sample(part, seeds, self._texts.greedy, **how)
                bar.update(len(part))
        return written

    def _decoded(self, who: EvalModel | Teacher, answers: Sequence[Completion]) -> list[str]:
        return [(who.chat or self._chat).decode(answer.ids) for answer in answers]

    def _judged(
        self,
        key: str,
        condition: str,
        who: EvalModel | Teacher,
        questions: Sequence[Example],
        answers,
    ) -> tuple[float, list[dict]]:
        """(accuracy, lines of RUN/answers.jsonl) of answers to at least one question."""
        lines = [
            {
                "set": key,
                "condition": condition,
                "name": question.name,
                "question": question.turns[-1].content,
                "expected": list(question.expected.any_of),
                "match": question.expected.match,
                "answer": text,
                "right": is_right(text, question.expected),
            }
            for question, text in zip(questions, self._decoded(who, answers), strict=True)
        ]
        return sum(line["right"] for line in lines) / len(lines), lines

    def _agreement(
        self, model: EvalModel, scored: ScoredText, view: str = "student"
    ) -> dict[str, float]:
        return scoring.mean_agreement(model, scored, view, self._config.gkd, self._mesh)


def unavailable(
    config: Config, teacher: Teacher, examples: Examples, baked: bool, validated: bool
) -> dict[str, str]:
    """Returns measure -> why it is missing, both in words.

    The run is `baked` if the teacher reads anything of the questions that the student does not, and
    `validated` if the loss of data.validation is measured.
    """
    found, can, top_k = {}, teacher.capabilities, config.teacher.top_k
    if not examples.questions:
        found["accuracy and recovery"] = "no questions with answers: set eval.questions"
    if not examples.heldout:
        found["accuracy on held-out questions"] = "none are there: set eval.heldout"
    if not examples.prompts:
        found["distance to the prompted teacher"] = (
            "no prompts to measure it on: set eval.questions or eval.prompts"
        )
    elif not can.on_policy:
        found["distance on the student's own text"] = f"the teacher cannot read it ({can.limits})"
    if examples.prompts and top_k is not None:
        rest = _OF_THE_REST[config.gkd.tail]
        found["exact divergences"] = f"the teacher gives its best {top_k} tokens: {rest}"
    if not baked:
        found["student with the prefix, and what the prefix costs"] = (
            "the teacher reads nothing that the student does not: there is no prefix to leave out"
        )
    if not config.eval.other_prefix:
        found["student with another prefix"] = "none was given: set eval.other_prefix"
    if not examples.retention:
        found["kept abilities"] = "no questions beside the task: set eval.retention"
    if not examples.side_effects:
        found["side effects"] = (
            "no unrelated prompts: set eval.side_effects, or eval.retention, whose prompts serve"
        )
    if not examples.validation:
        found["validation loss"] = "no rows for it: set data.validation"
    elif not validated:
        found["validation loss"] = (
            "the teacher does not say what it predicts in text that it did not write"
            f" ({can.limits}), and rows of data.validation bring responses"
        )
    return found
