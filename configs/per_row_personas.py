"""Rows that bring prefixes of their own: three personas in one student, and a prefix for the rest.

    python -m gkdjax.main --config=configs/per_row_personas.py

Each row of `per_row_personas/rows.jsonl` has the system message of its persona as
`prefix_messages`, which wins over the global prefix, and its user calls the persona by its name:
"Captain Brine, why does it rain?". The student reads no prefix, so the name is all that it has to
go by. Without it there would be one student view for three teachers: the least loss is then their
average, a character that is none of them. Rows without `prefix_messages` are taught under the
global prefix, a plain assistant. The evaluation looks for the words with which each persona ends.

Meant for one GPU of 24 GB. Run time and result: unknown, this mode has not been run yet.

    python -m gkdjax.main --config=configs/per_row_personas.py:tiny

The same on a random model of 512 tokens, made on the spot in `runs/tiny_models`. Expected, on 2 CPU
cores: 45 seconds, most of them compilation; the forward KL to the prompted model falls from 0.030
to 0.011 nats a token on questions that were not trained. The answers of such a model are noise, so
none ends as it should, before or after.
"""

import pathlib

from gkdjax import config
from gkdjax.tools import tiny_mode

HERE = pathlib.Path(__file__).parent
DATA = HERE / "per_row_personas"


def get_config(mode: str = ""):
    tiny = tiny_mode.is_asked(mode, __file__)
    c = config.default()
    c.student.model = "Qwen/Qwen3-0.6B"
    c.student.compute_dtype = "bfloat16"
    c.context.prefix_messages = [
        {"role": "system", "content": "You are a plain assistant. Answer in one short sentence."}
    ]

    c.data.train = str(DATA / "rows.jsonl")
    c.data.max_length = 512
    c.data.template_kwargs = {"enable_thinking": False}
    c.rollout.per_prompt = 8  # three characters: more text of each
    c.rollout.max_new_tokens = 96
    c.anchor.data = str(HERE / "general/systems.jsonl")  # who is given a character keeps to it

    c.optim.learning_rate = 2e-4
    c.optim.warmup_ratio = 0.1
    c.train.epochs = 3.0  # 126 steps
    c.train.remat = True
    c.eval.questions = str(DATA / "questions.jsonl")
    c.eval.retention = {"facts": str(HERE / "general/facts.jsonl")}
    c.eval.every_steps = 42
    if tiny:
        tiny_mode.shrink(c)
    return c
