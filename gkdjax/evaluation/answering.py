"""Greedy answers, and whether they are right."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from gkdjax.config import Config
from gkdjax.data.answer_matching import is_right
from gkdjax.data.chat_template import Chat
from gkdjax.evaluation.scoring import EvalModel
from gkdjax.teachers.base import Teacher
from gkdjax.types import Completion, Example, SamplingParams
from gkdjax.utils import text as utils_text


class Judged(NamedTuple):
    """Answers to the questions of one set."""

    accuracy: float  # share of right ones
    lines: list[dict]  # of RUN/answers.jsonl, one an answer


class Answering:
    """Asks models, and looks at what they say."""

    def __init__(
        self,
        config: Config,
        chat: Chat,
        greedy: SamplingParams,
        lengths: Sequence[int],
        mesh: Mesh,
        shared_vocab: int,
    ):
        """Of a run.

        Args:
          config: the run's.
          chat: the student's, and that of a teacher that has none of its own.
          greedy: how tokens are drawn.
          lengths: padded prompt lengths.
          mesh: its devices share the rows.
          shared_vocab: ids below it are drawn.
        """
        self._config, self._chat, self._greedy = config, chat, greedy
        self._lengths, self._mesh, self._shared_vocab = lengths, mesh, shared_vocab

    def ask(self, reader: EvalModel, prompts: Sequence[np.ndarray], what: str) -> list[Completion]:
        """An answer to each prompt; `what` stands at the progress bar."""
        rows = self._config.eval.batch_size
        written: list[Completion] = []
        with utils_text.bar(len(prompts), what, shown=self._config.log.progress_bar) as bar:
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

    def texts(self, who: EvalModel | Teacher, answers: Sequence[Completion]) -> list[str]:
        """What was said, decoded as its author's tokenizer has it."""
        return [(who.chat or self._chat).decode(answer.ids) for answer in answers]

    def judge(
        self,
        of: str,
        condition: str,
        who: EvalModel | Teacher,
        questions: Sequence[Example],
        answers: Sequence[Completion],
    ) -> Judged:
        """Whether answers are right.

        Args:
          of: the name of the set of questions.
          condition: under which they were answered.
          who: has answered.
          questions: at least one.
          answers: one to each.
        """
        lines = [
            {
                "set": of,
                "condition": condition,
                "name": question.name,
                "question": question.turns[-1].content,
                "expected": list(question.expected.any_of),
                "match": question.expected.match,
                "answer": text,
                "right": is_right(text, question.expected),
            }
            for question, text in zip(questions, self.texts(who, answers), strict=True)
        ]
        return Judged(sum(line["right"] for line in lines) / len(lines), lines)
