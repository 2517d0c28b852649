"""Configs and teachers for whole runs in this process, of few shapes and steps."""

import json
import os
import pathlib
import signal

import jax.numpy as jnp
import numpy as np

from gkdjax import config
from gkdjax.losses import TopKLogprobs
from gkdjax.losses.objective import TopKTargets
from gkdjax.teachers.base import Capabilities
from gkdjax.types import Completion

PREFIX = [{"role": "system", "content": "be brief"}]


def small(student: str, **changes):
    """A config of few shapes and steps; `changes` are like gkd__divergence="mixed"."""
    c = config.default()
    c.student.model = student
    c.student.lora.rank = 2
    c.student.lora.dropout = 0.0
    c.student.lora.targets = ("q_proj", "down_proj")  # fewer leaves compile sooner
    c.context.prefix_messages = PREFIX
    c.data.train = [{"prompt": f"ask {i}"} for i in range(6)]
    c.data.max_length = 64
    c.data.bucket_lengths = (32, 64)
    c.rollout.per_prompt = 1
    c.rollout.max_new_tokens = 4
    c.optim.learning_rate = 1e-2
    c.train.batch_size = 4
    c.train.epochs = None
    c.train.steps = 4
    c.eval.max_new_tokens = 4
    c.eval.batch_size = 4
    c.checkpoint.every_steps = 2
    c.log.tensorboard = False
    c.log.progress_bar = False
    for key, value in changes.items():
        section, _, name = key.partition("__")
        c[section][name] = value
    return c


def metrics(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses_hex(workdir: pathlib.Path) -> list[str]:
    return [line["loss"].hex() for line in metrics(workdir)]


class ConstantTeacher:
    """Puts 90 % on one token, everywhere, and stops at once; it may break down on the way."""

    capabilities = Capabilities(max_top_k=1, dense=False, samples=True, temperature=False)
    chat = None
    description = "a constant"

    def __init__(
        self, token: int, stop: int, fails_at: int | None = None, stopped_at: int | None = None
    ):
        self.token, self.stop = token, stop
        self.calls, self.fails_at, self.stopped_at = 0, fails_at, stopped_at

    def targets(self, batch):
        self.calls += 1
        if self.calls == self.fails_at:
            raise ConnectionError("gone")
        if self.calls == self.stopped_at:
            os.kill(os.getpid(), signal.SIGTERM)
        shape = (*batch.target_ids_BN.shape, 1)
        topk = TopKLogprobs(
            jnp.full(shape, self.token, jnp.int32), jnp.full(shape, np.log(0.9), jnp.float32)
        )
        return TopKTargets(topk, topk.logprobs[..., 0])

    def sample(self, prompts, seeds, sampling):
        return [Completion(np.asarray([self.token, self.stop], np.int32), True) for _ in prompts]
