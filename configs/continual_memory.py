"""The history of chats into the weights: facts from earlier messages without reading them.

    python -m gkdjax.main --config=configs/continual_memory.py

With `context.history_as_prefix` each of the assistant's messages in `continual_memory/chats.jsonl`
becomes a row: the earlier messages are the teacher's prefix, of which the student reads the last
two (`context.student_retained_turns = 2`), and the question itself. So the name of a dog that came
up four messages ago has to come from the weights. The evaluation asks in other chats of the same
user: there, too, the teacher reads the fact at the beginning, and the student does not.

Next week's chats go on from this week's adapter: `student.lora.init_from`.

Meant for one GPU of 24 GB. Run time and result: unknown, this mode has not been run yet.

    python -m gkdjax.main --config=configs/continual_memory.py:tiny

The same on a random model of 512 tokens, made on the spot in `runs/tiny_models`; the student
retains nothing, as a random model hardly uses text further back than two messages. Expected, on 2
CPU cores: 40 seconds, most of them compilation; the forward KL to the model that reads everything
falls from 0.034 to 0.013 nats a token in chats that were not trained, through the features that all
histories share. The answers of such a model are noise.
"""

import pathlib

from gkdjax import config
from gkdjax.tools import tiny_mode

HERE = pathlib.Path(__file__).parent
DATA = HERE / "continual_memory"


def get_config(mode: str = ""):
    tiny = tiny_mode.is_asked(mode, __file__)
    c = config.default()
    c.student.model = "Qwen/Qwen3-0.6B"
    c.student.compute_dtype = "bfloat16"
    c.context.history_as_prefix = True
    c.context.student_retained_turns = 2

    c.data.train = str(DATA / "chats.jsonl")
    c.data.max_length = 1024
    c.data.too_long = "truncate-prefix"  # of a longer chat the oldest messages are forgotten
    c.data.template_kwargs = {"enable_thinking": False}
    c.anchor.data = str(HERE / "general/tasks.jsonl")

    c.optim.learning_rate = 5e-5
    c.optim.warmup_ratio = 0.1
    c.train.epochs = 30.0  # 16 chats are 51 rows: 96 steps
    c.train.batch_size = 16
    c.train.grad_accum_steps = 8
    c.train.remat = True
    c.anchor.batch_size = 16
    c.eval.questions = str(DATA / "questions.jsonl")
    c.eval.retention = {"facts": str(HERE / "general/facts.jsonl")}
    c.eval.every_steps = 32
    if tiny:
        # A random model hardly heeds what lies further back than two messages.
        c.context.student_retained_turns = 0
        tiny_mode.shrink(c, steps=32, learning_rate=3e-3)
    return c
