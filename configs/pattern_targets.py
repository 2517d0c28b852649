r"""Only a part of the response is learnt: the line with the answer, and not the way to it.

    python -m gkdjax.main --config=configs/pattern_targets.py

The prefix asks for reasoning, and then a line that begins with "Answer:". The teacher writes a
response without such a line again, up to `rollout.max_retries` times; then it is dropped, counted
and named. With `context.target_span = "match"` the targets are the tokens that
`context.target_content_pattern` matches: the student reads the reasoning as it was written, and
learns the line that follows from it. With "message", the default, the pattern chooses whole
messages: the student would learn the reasoning as well, and how to stop.

The pattern is `(?m)^Answer:.*`. As `^Answer:` (bakery's, which sets no flags either) it would match
at the very beginning alone, so nowhere where the reasoning comes first.

Rows with a response work the same way: those of `pattern_targets/worked.jsonl` are the validation
split, whose loss is that of the line, too.

Meant for one GPU of 24 GB. Run time and result: unknown, this mode has not been run yet.

    python -m gkdjax.main --config=configs/pattern_targets.py:tiny

The same on a random model of 512 tokens, made on the spot in `runs/tiny_models`. It never writes
"Answer:", so it learns the worked problems: 14 of them, and 6 are the validation split. Expected,
on 2 CPU cores: 75 seconds, most of them compilation; the loss on those 6, of the answers' lines
alone, falls from 0.0047 to 0.0019 nats a token.
"""

import json
import pathlib

from gkdjax import config
from gkdjax.tools import tiny_mode

HERE = pathlib.Path(__file__).parent
DATA = HERE / "pattern_targets"


def get_config(mode: str = ""):
    tiny = tiny_mode.is_asked(mode, __file__)
    c = config.default()
    c.student.model = "Qwen/Qwen3-0.6B"
    c.student.compute_dtype = "bfloat16"
    c.context.prefix_messages = json.loads((DATA / "prefix.json").read_text())
    c.context.target_content_pattern = r"(?m)^Answer:.*"
    c.context.target_span = "match"

    c.data.train = str(DATA / "problems.jsonl")
    c.data.validation = str(DATA / "worked.jsonl")
    c.data.max_length = 768
    c.data.template_kwargs = {"enable_thinking": False}  # it thinks aloud, as it is told to
    c.rollout.per_prompt = 8
    c.rollout.max_new_tokens = 384
    c.anchor.data = str(HERE / "general/tasks.jsonl")

    c.optim.learning_rate = 1e-4
    c.optim.warmup_ratio = 0.1
    c.train.epochs = 3.0  # 84 steps
    c.train.remat = True
    c.eval.questions = str(DATA / "questions.jsonl")
    c.eval.match = "regex"
    c.eval.retention = {"facts": str(HERE / "general/facts.jsonl")}
    c.eval.max_new_tokens = 384
    c.eval.batch_size = 32
    c.eval.every_steps = 28
    if tiny:
        c.data.train, c.data.validation = tiny_mode.split_rows(c.data.validation, 14)
        tiny_mode.shrink(c, steps=32, learning_rate=3e-3)
    return c
