"""Gemma 3 1B into 270M, and a system message into the weights in the same run.

    python -m gkdjax.main --config=configs/gemma3.py

The teacher reads `gemma3/prefix.json` (short plain answers that end with a line "Check: ..."); the
student learns to answer so without it: 100 steps of forward KL on the teacher's text, then 100 of a
generalized JSD, half of them on its own text. Its anchor is other tasks, half of them under other
system messages, which it must keep obeying. The evaluation counts how many of 32 answers have that
last line.

Both models are gated: see the README beside this file. Sized for one GPU of 24 GB or more, or a
v5e-8. Run time and result: unknown, this mode has not been run yet.

    python -m gkdjax.main --config=configs/gemma3.py:tiny

The same on random models of 262,144 tokens, made on the spot in `runs/tiny_models`: it tries the
plumbing, and the answers are noise. Expected, on 2 CPU cores: 80 seconds, most of them compilation;
the first five steps take the loss from 0.89 to 0.45 nats a token.
"""

import json
import pathlib

from gkdjax import config
from gkdjax.tools import tiny_mode

HERE = pathlib.Path(__file__).parent / "gemma3"


def get_config(mode: str = ""):
    tiny = tiny_mode.is_asked(mode, __file__)
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
    c.rollout.per_prompt = 4
    c.rollout.max_new_tokens = 128
    c.rollout.temperature = 1.0
    c.rollout.top_p = 1.0  # the distribution that the divergence compares, not a sharper one

    c.gkd.on_policy_warmup_steps = 100
    c.gkd.warmup_divergence = "forward_kl"
    c.gkd.on_policy_fraction = 0.5
    c.gkd.divergence = "generalized_jsd"
    c.gkd.jsd_beta = 0.5
    c.gkd.chunk_size = 1024  # 1 GiB: smaller chunks would read the tables more often
    c.anchor.data = str(HERE / "anchor.jsonl")
    c.anchor.reference = "base"
    c.anchor.batch_size = 32

    c.train.epochs = None
    c.train.steps = 200
    c.train.batch_size = 32
    c.train.grad_accum_steps = 4  # 8 rows at once: one for each chip of a v5e-8
    c.train.remat = True
    c.train.export = "both"
    c.eval.questions = str(HERE / "held_out.jsonl")
    c.eval.match = "regex"
    c.eval.retention = {"facts": str(HERE.parent / "general/facts.jsonl")}
    c.eval.other_prefix = [{"role": "system", "content": "Answer with a single word."}]
    c.eval.every_steps = 50
    c.eval.max_new_tokens = 128
    c.eval.batch_size = 32
    if tiny:
        _make_tiny(c)
    return c


def _make_tiny(c):
    """A vocabulary of Gemma's size, and so fewer and shorter rows than other tiny modes."""
    tiny_mode.shrink(c, vocab_size=262_144, steps=10, learning_rate=1e-2)
    c.data.train = tiny_mode.first_rows(c.data.train, 8)
    c.eval.questions = tiny_mode.first_rows(c.eval.questions, 4)
    c.data.bucket_lengths = (8, 128, 512)
    c.gkd.chunk_size = 128
    c.rollout.max_new_tokens = c.eval.max_new_tokens = 8
    c.eval.batch_size = 4
