"""Gemma 3 1B into 270M, and a system message into the weights in the same run.

    python -m gkdjax.main --config=configs/gemma3.py

The teacher reads `gemma3/prefix.json` (short plain answers that end with a line "Check: ..."); the
student learns to answer so without it: 100 steps of forward KL on the teacher's text, then 100 of a
generalized JSD, half of them on its own text. Its anchor are other tasks, half of them under other
system messages, which it must keep obeying.

Both models are gated: see the README. Sized for one GPU of
24 GB or more, or a v5e-8. Run time and result: unknown, this mode has not been run yet.

    python -m gkdjax.main --config=configs/gemma3.py:tiny

The same on random models of 262,144 tokens, made on the spot in `runs/tiny_models`: it tries the
plumbing, and the answers are noise. Expected, on 2 CPU cores: one minute, most of it compilation;
the first five steps take the loss from 0.77 to 0.44 nats a token.
"""

import json
import pathlib

from gkdjax import config

HERE = pathlib.Path(__file__).parent / "gemma3"
MODES = ("", "tiny")


def get_config(mode: str = ""):
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}: write configs/gemma3.py, or configs/gemma3.py:tiny")
    c = config.default()
    c.teacher.backend = "flax"
    c.teacher.model = "google/gemma-3-1b-it"
    c.student.model = "google/gemma-3-270m-it"
    c.student.compute_dtype = "bfloat16"
    c.student.lora.rank = 64
    c.student.lora.alpha = 128.0
    c.student.lora.targets = "all-linear"

    c.context.prefix_messages = json.loads((HERE / "prefix.json").read_text())
    c.data.train = str(HERE / "prompts.jsonl")
    c.data.max_length = 512
    c.data.bucket_lengths = (64, 128, 192, 256, 384, 512)
    c.trajectory.per_prompt = 4
    c.trajectory.max_new_tokens = 128
    c.trajectory.temperature = 1.0
    c.trajectory.top_p = 1.0  # the distribution that the divergence compares, not a sharper one

    c.gkd.on_policy_warmup_steps = 100
    c.gkd.warmup_divergence = "forward_kl"
    c.gkd.on_policy_fraction = 0.5
    c.gkd.divergence = "generalized_jsd"
    c.gkd.jsd_beta = 0.5
    c.gkd.chunk_size = 1024  # 1 GiB: smaller chunks would read the tables more often
    c.anchor.data = str(HERE / "anchor.jsonl")
    c.anchor.towards = "base"
    c.anchor.batch_size = 32

    c.train.epochs = None
    c.train.steps = 200
    c.train.batch_size = 32
    c.train.accumulation = 4  # 8 rows at once: one for each chip of a v5e-8
    c.train.remat = True
    c.train.export = "both"
    c.eval.prompts = str(HERE / "held_out.jsonl")
    c.eval.every_steps = 50
    c.eval.max_new_tokens = 128
    c.eval.batch_size = 32
    if mode == "tiny":
        _make_tiny(c)
    return c


def _make_tiny(c):
    """Other models, and less of everything; what is done stays the same."""
    from gkdjax.tools.make_tiny import make_tiny  # slow to import, and the full mode needs it not

    models = pathlib.Path("runs/tiny_models")
    c.teacher.model, c.student.model = str(models / "teacher"), str(models / "student")
    make_tiny(c.teacher.model, width=96, layers=3, vocab_size=262_144, seed=1)
    make_tiny(c.student.model, width=64, layers=2, vocab_size=262_144, seed=2)
    c.student.compute_dtype = "float32"
    c.student.lora.rank = 8
    c.student.lora.alpha = 16.0

    # A token a character: the teacher reads 300 of the prefix.
    c.data.train = _rows("prompts.jsonl", 8)
    c.anchor.data = _rows("anchor.jsonl", 8)
    c.eval.prompts = _rows("held_out.jsonl", 4)
    c.data.bucket_lengths = (8, 128, 512)
    c.gkd.chunk_size = 128
    c.trajectory.per_prompt = 1
    c.trajectory.max_new_tokens = 8
    c.gkd.on_policy_warmup_steps = 5
    c.optim.learning_rate = 1e-2
    c.train.steps = 10
    c.train.batch_size = 8
    c.train.accumulation = 2
    c.anchor.batch_size = 8
    c.eval.every_steps = 5
    c.eval.max_new_tokens = 8
    c.eval.batch_size = 4


def _rows(name: str, count: int) -> list[dict]:
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]
