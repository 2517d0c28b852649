"""The embedded default: a small teacher, a smaller student, a cipher key baked in.

    python -m gkdjax.main --config=configs/quickstart.py

The teacher reads a cipher key in its system message and maps letters by it. The student is
distilled to map them without: 150 steps of forward KL on the teacher's text, then 150 of reverse KL
on its own, while an anchor keeps its other abilities. Models and data ship with the package
(`gkdjax/config/assets/quickstart`).

Expected, on 2 CPU cores: two and a half minutes; recovery 1.000 with seeds 0, 1 and 2, no other
ability down by more than one point.
"""

import json

from gkdjax import config

QUICKSTART = config.ASSETS / "quickstart"


def get_config():
    c = config.default()
    c.student.model = str(QUICKSTART / "student")
    c.student.lora.rank = 16
    c.student.lora.alpha = 32.0
    c.student.lora.dropout = 0.0
    c.teacher.backend = "flax"
    c.teacher.model = str(QUICKSTART / "teacher")

    c.context.prefix_messages = json.loads((QUICKSTART / "prefix.json").read_text())
    c.data.train = str(QUICKSTART / "train.jsonl")
    c.data.max_length = 80
    c.rollout.per_prompt = 1
    c.rollout.max_new_tokens = 12
    c.rollout.temperature = 1.0
    c.rollout.top_p = 1.0

    c.gkd.on_policy_fraction = 1.0
    c.gkd.on_policy_warmup_steps = 150
    c.gkd.warmup_divergence = "forward_kl"
    c.gkd.divergence = "reverse_kl"
    c.anchor.data = str(QUICKSTART / "anchor.jsonl")
    c.anchor.reference = "base"
    c.anchor.batch_size = 64

    c.optim.learning_rate = 5e-3
    c.optim.warmup_ratio = 0.1
    c.train.epochs = None
    c.train.steps = 300
    c.train.batch_size = 64
    c.train.export = "both"

    c.eval.questions = str(QUICKSTART / "questions.jsonl")
    c.eval.retention = {
        "reverse": str(QUICKSTART / "retention/reverse.jsonl"),
        "sort": str(QUICKSTART / "retention/sort.jsonl"),
        "other keys": str(QUICKSTART / "retention/other_keys.jsonl"),
    }
    c.eval.match = "exact"
    with (QUICKSTART / "retention/other_keys.jsonl").open() as others:
        c.eval.other_prefix = json.loads(next(others))["prefix_messages"]
    c.eval.max_new_tokens = 12
    c.eval.batch_size = 256
    c.eval.every_steps = 50
    return c
