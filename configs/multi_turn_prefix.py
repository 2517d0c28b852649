"""A prefix of several turns: a system message and worked examples, baked as a whole.

    python -m gkdjax.main --config=configs/multi_turn_prefix.py

`multi_turn_prefix/prefix.json` has a system message and three examples of a task, notes that become
one line "WHO | WHAT | WHEN". Qwen 3 0.6B that reads all of this teaches itself without it
(`context.student_retained_turns = 0`; with 2 the student would read the last example, too). First
the teacher writes, then, for half of the steps, the student: a format is lost at the first wrong
token, and only the student's own text shows where. The evaluation checks each line by the note's
regular expression.

Meant for one GPU of 24 GB. Run time and result: unknown, this mode has not been run yet.

    python -m gkdjax.main --config=configs/multi_turn_prefix.py:tiny

The same on a random model of 512 tokens, made on the spot in `runs/tiny_models`. Expected, on 2 CPU
cores: 50 seconds, most of them compilation; the forward KL to the prompted model falls from 0.031
to 0.008 nats a token on notes that were not trained. The lines of such a model are noise, so none
is right, before or after.
"""

import pathlib

from gkdjax import config
from gkdjax.tools import tiny_mode

HERE = pathlib.Path(__file__).parent
DATA = HERE / "multi_turn_prefix"


def get_config(mode: str = ""):
    tiny = tiny_mode.is_asked(mode, __file__)
    c = config.default()
    c.student.model = "Qwen/Qwen3-0.6B"
    c.student.compute_dtype = "bfloat16"
    c.student.lora.rank = 32
    c.student.lora.alpha = 64.0
    c.student.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    c.context.prefix_file = str(DATA / "prefix.json")
    c.context.student_retained_turns = 0

    c.data.train = str(DATA / "notes.jsonl")
    c.data.max_length = 512
    c.data.template_kwargs = {"enable_thinking": False}
    c.rollout.max_new_tokens = 48
    c.gkd.on_policy_fraction = 0.5
    c.gkd.on_policy_warmup_steps = 40
    c.gkd.warmup_divergence = "forward_kl"
    c.gkd.divergence = "reverse_kl"
    c.anchor.data = str(HERE / "general/tasks.jsonl")

    c.optim.learning_rate = 2e-4
    c.optim.warmup_ratio = 0.1
    c.train.epochs = 5.0  # 100 steps
    c.train.remat = True
    c.eval.questions = str(DATA / "questions.jsonl")
    c.eval.heldout = str(DATA / "heldout.jsonl")
    c.eval.match = "regex"
    c.eval.side_effects = str(HERE / "general/facts.jsonl")
    c.eval.max_new_tokens = 48
    c.eval.every_steps = 20
    if tiny:
        tiny_mode.shrink(c)
    return c
