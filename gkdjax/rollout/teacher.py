"""Has the teacher write the text that a run learns from: the first one, and refreshed text."""

import functools
import pathlib

from gkdjax.config import Config
from gkdjax.data.dataset import DistillDataset
from gkdjax.models import sampler
from gkdjax.rollout.generate import Generator, generate
from gkdjax.rollout.reuse import Source
from gkdjax.teachers.base import Teacher
from gkdjax.types import Completion


def prepare(
    config: Config,
    name: str,
    dataset: DistillDataset,
    teacher: Teacher,
    workdir: pathlib.Path,
    vocab_size: int,
) -> DistillDataset:
    """Returns the stream `name` with its first text, which is in RUN/trajectories_NAME.jsonl.

    `vocab_size` ids are common to student and teacher.
    """
    source = None
    if name == "train" and config.rollout.reuse:
        source = Source(
            pathlib.Path(config.rollout.reuse),
            teacher.description,
            config.teacher.top_k,
            config.gkd.temperature if teacher.capabilities.temperature else 1.0,
            vocab_size,
            text_alone=teacher.capabilities.scores,
        )
    path = workdir / f"trajectories_{name}.jsonl"
    return dataset.with_rollouts(_written(config, dataset, teacher, path, source=source))


def refresh(
    config: Config,
    dataset: DistillDataset,
    teacher: Teacher,
    workdir: pathlib.Path,
    steps: list[int],
    at: int,
) -> DistillDataset:
    """Returns `prepare`'s dataset with new text for the rows of some steps.

    It is in RUN/trajectories_train_STEP.jsonl, STEP being `at`, the first step of their block.
    """
    path = workdir / f"trajectories_train_{at:06d}.jsonl"
    rollouts = _written(config, dataset, teacher, path, steps=steps, step=at)
    return dataset.refreshed(rollouts, steps, at)


def _written(config: Config, dataset, teacher: Teacher, path, **how) -> dict[int, Completion]:
    write = functools.partial(teacher.sample, sampling=sampler.sampling(config))
    how |= {"chunk": config.eval.batch_size, "show": config.log.progress_bar}
    return generate(dataset, Generator(teacher.description, write), path, **how)
