"""A chat dataset whose rows bring responses: nobody writes, the teacher only reads.

    python -m gkdjax.main --config=configs/sft_dataset.py

1,000 conversations of `HuggingFaceH4/ultrachat_200k` (`pip install -e '.[datasets]'`; downloaded
once). The targets are all of the assistant's messages, and the student learns at each of their
tokens not the token, as in supervised fine-tuning, but the whole distribution of the teacher: Qwen
3 0.6B that reads `sft_dataset/system_prompt.txt`. So the dataset gives the topics, and the prefix
the manner. The manner shows less in other people's words than in the teacher's: beside the loss on
this text, look at the distance on the teacher's own (`eval.prompts`). The validation split is the
dataset's.

A dataset with two columns for the same thing is refused, except for a `prompt` that repeats the
beginning of `messages`, as here. The anchor has only other system messages: every answer without a
system message should change.

Meant for one GPU of 24 GB. Run time and result: unknown, this mode has not been run yet.

    python -m gkdjax.main --config=configs/sft_dataset.py:tiny

The same on a random model of 512 tokens, made on the spot in `runs/tiny_models`, with 24 short
conversations in the dataset's columns, a quarter of them as the validation split. Expected, on 2
CPU cores: a minute, most of it compilation; the validation loss falls from 0.020 to 0.006 nats a
token, the forward KL on the teacher's own text from 0.029 to 0.007.
"""

import pathlib

from gkdjax import config
from gkdjax.tools import tiny_mode

HERE = pathlib.Path(__file__).parent
DATA = HERE / "sft_dataset"


def get_config(mode: str = ""):
    tiny = tiny_mode.is_asked(mode, __file__)
    c = config.default()
    c.student.model = "Qwen/Qwen3-0.6B"
    c.student.compute_dtype = "bfloat16"
    c.context.system_prompt_file = str(DATA / "system_prompt.txt")

    c.data.train = "HuggingFaceH4/ultrachat_200k:train_sft[:1000]"
    c.data.validation = "HuggingFaceH4/ultrachat_200k:test_sft[:100]"
    c.data.max_length = 1024
    c.data.too_long = "truncate-right"
    c.data.template_kwargs = {"enable_thinking": False}
    c.anchor.data = str(HERE / "general/systems.jsonl")

    c.optim.learning_rate = 1e-4
    c.optim.warmup_ratio = 0.1
    c.train.epochs = 1.0
    c.train.batch_size = 16
    c.train.grad_accum_steps = 4
    c.train.remat = True
    c.anchor.batch_size = 8
    c.eval.prompts = str(DATA / "prompts.jsonl")
    c.eval.retention = {"facts": str(HERE / "general/facts.jsonl")}
    c.eval.batch_size = 8
    c.eval.every_steps = 50
    if tiny:
        c.data.train, c.data.validation = str(DATA / "sample.jsonl"), 0.25
        tiny_mode.shrink(c)
    return c
