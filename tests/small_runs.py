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
SMALL = {
    "student__lora__rank": 2,
    "student__lora__dropout": 0.0,
    "student__lora__targets": ("q_proj", "down_proj"),  # fewer leaves compile sooner
    "context__prefix_messages": PREFIX,
    "data__train": [{"prompt": f"ask {i}"} for i in range(6)],
    "data__max_length": 64,
    "data__bucket_lengths": (32, 64),
    "rollout__per_prompt": 1,
    "rollout__max_new_tokens": 4,
    "optim__learning_rate": 1e-2,
    "train__batch_size": 4,
    "train__epochs": None,
    "train__steps": 4,
    "anchor__batch_size": 4,
    "eval__max_new_tokens": 4,
    "eval__batch_size": 4,
    "checkpoint__every_steps": 2,
    "log__tensorboard": False,
    "log__progress_bar": False,
}


def small(student: str, **changes):
    """A config of few shapes and steps; `changes` are like gkd__divergence="mixed"."""
    c = config.default()
    for key, value in ({"student__model": student} | SMALL | changes).items():
        *sections, name = key.split("__")
        section = c
        for each in sections:
            section = section[each]
        section[name] = value
    return c


def talk(*texts: str) -> dict:
    """A row of messages, by the user and the assistant in turn."""
    roles = ("user", "assistant") * len(texts)
    pairs = zip(roles, texts, strict=False)
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def metrics(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: pathlib.Path) -> list[float]:
    return [line["loss"] for line in metrics(workdir)]


def losses_hex(workdir: pathlib.Path) -> list[str]:
    return [loss.hex() for loss in losses(workdir)]


def merged_weights(workdir: pathlib.Path) -> bytes:
    return (workdir / "merged" / "model.safetensors").read_bytes()


def outcome(workdir: pathlib.Path) -> tuple:
    """What equal runs share to the bit: losses, batches, texts, exported weights."""
    lines = [(line["loss"].hex(), line["batch_crc32"]) for line in metrics(workdir)]
    texts = {path.name: path.read_bytes() for path in workdir.glob("trajectories_*.jsonl")}
    return lines, texts, (workdir / "merged" / "model.safetensors").read_bytes()


class ConstantTeacher:
    """Puts 90 % on one token, everywhere, and stops at once; it may break down on the way."""

    capabilities = Capabilities(max_top_k=1, dense=False, samples=True, temperature=False)
    chat = None
    description = "a constant"

    def __init__(
        self,
        token: int = 50,  # "K"
        stop: int = 5,  # <end_of_turn>
        fails_at: int | None = None,
        stopped_at: int | None = None,
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
