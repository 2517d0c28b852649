"""The text that a run learns from: the teacher's, first and refreshed, and the student's.

`rollout.schedule` says which, `data.dataset` and `rollout.student` make the batches.
"""

import functools
import pathlib

from gkdjax.config import Config
from gkdjax.data.dataset import DistillDataset
from gkdjax.models import sampler
from gkdjax.rollout.generate import Generator, generate
from gkdjax.rollout.reuse import Source
from gkdjax.teachers.base import Teacher


def prepare(
    config: Config,
    name: str,
    dataset: DistillDataset,
    teacher: Teacher,
    workdir: pathlib.Path,
    vocab_size: int,
) -> DistillDataset:
    """One stream with its first text, which lies in RUN/trajectories_NAME.jsonl.

    Args:
      config: of the run.
      name: of the stream.
      dataset: its rows.
      teacher: writes where they bring no response.
      workdir: of the run.
      vocab_size: of the ids that student and teacher have in common.
    """
    path, generator = workdir / f"trajectories_{name}.jsonl", _generator(config, teacher)
    source = _source(config, teacher, vocab_size) if name == "train" else None
    rollouts = generate(dataset, generator, path, source=source, **_how(config))
    return dataset.with_rollouts(rollouts)


def refresh(
    config: Config,
    dataset: DistillDataset,
    teacher: Teacher,
    workdir: pathlib.Path,
    steps: list[int],
    at: int,
) -> DistillDataset:
    """New text for the rows of some steps, in RUN/trajectories_train_STEP.jsonl.

    Args:
      config, dataset, teacher, workdir: as for `prepare`; the dataset has its first text.
      steps: that it is for.
      at: the first step of their block.
    """
    path, generator = workdir / f"trajectories_train_{at:06d}.jsonl", _generator(config, teacher)
    rollouts = generate(dataset, generator, path, steps=steps, step=at, **_how(config))
    return dataset.refreshed(rollouts, steps, at)


def _generator(config: Config, teacher: Teacher) -> Generator:
    how = sampler.sampling(config)
    return Generator(teacher.description, functools.partial(teacher.sample, sampling=how))


def _how(config: Config) -> dict:
    return {"chunk": config.eval.batch_size, "show": config.log.progress_bar}


def _source(config: Config, teacher: Teacher, vocab_size: int) -> Source | None:
    if not config.rollout.reuse:
        return None
    return Source(
        pathlib.Path(config.rollout.reuse),
        teacher.description,
        config.teacher.top_k,
        config.gkd.temperature if teacher.capabilities.temperature else 1.0,
        vocab_size,
        text_alone=teacher.capabilities.scores,
    )
