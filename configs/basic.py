"""The basic job: a system prompt into the weights of the model that reads it (self-baking).

    python -m gkdjax.main --config=configs/basic.py

Qwen 3 0.6B reads `basic/system_prompt.txt` (Juniper of a garden centre: two friendly sentences that
end with "Happy growing!") and answers 48 questions about plants, four times each; its adapter
learns to answer so without it. The anchor is other tasks and other system messages: Juniper should
answer only about plants. The evaluation counts the answers that end with the phrase, under six
conditions (`gkdjax/evaluation/evaluate.py`), one of them another system message. All checkpoints,
the "half-baked" ones too, stay and can be exported:

    python -m gkdjax.tools.export_hf --checkpoint=runs/basic --out=models/half_baked --step=12

Meant for one GPU of 24 GB. Run time and result: unknown, this mode has not been run yet.

    python -m gkdjax.main --config=configs/basic.py:tiny

The same on a random model of 512 tokens, made on the spot in `runs/tiny_models`. Expected, on 2 CPU
cores: 50 seconds, most of them compilation; the forward KL to the prompted model falls from 0.041
to 0.006 nats a token on questions that were not trained. The answers of such a model are noise, so
none is right, before or after.
"""

import pathlib

from gkdjax import config
from gkdjax.tools import tiny_mode

HERE = pathlib.Path(__file__).parent
DATA = HERE / "basic"


def get_config(mode: str = ""):
    tiny = tiny_mode.is_asked(mode, __file__)
    c = config.default()
    c.student.model = "Qwen/Qwen3-0.6B"
    c.student.compute_dtype = "bfloat16"
    c.student.lora.rank = 64
    c.student.lora.alpha = 128.0  # on all seven kernels, with dropout 0.05: the defaults
    c.context.system_prompt_file = str(DATA / "system_prompt.txt")

    c.data.train = str(DATA / "prompts.jsonl")
    c.data.max_length = 512
    c.data.template_kwargs = {"enable_thinking": False}
    c.rollout.per_prompt = 4
    c.rollout.max_new_tokens = 128
    c.rollout.temperature = 0.8
    c.anchor.data = {
        "tasks": str(HERE / "general/tasks.jsonl"),
        "systems": str(HERE / "general/systems.jsonl"),
    }

    c.optim.learning_rate = 1e-4
    c.optim.schedule = "cosine"
    c.optim.warmup_ratio = 0.1
    c.train.epochs = 3.0  # 72 steps of 8 rows
    c.train.batch_size = 8
    c.train.remat = True
    c.train.export = "both"

    c.eval.questions = str(DATA / "questions.jsonl")
    c.eval.heldout = str(DATA / "heldout.jsonl")
    c.eval.retention = {"facts": str(HERE / "general/facts.jsonl")}
    c.eval.other_prefix = [{"role": "system", "content": "You are a botanist. Answer in Latin."}]
    c.eval.every_steps = 24  # once an epoch
    c.eval.at_steps = (6, 12)
    c.checkpoint.keep_evaluated = True
    if tiny:
        tiny_mode.shrink(c)
    return c
