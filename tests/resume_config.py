"""Configs of the runs that are killed: --config=tests/resume_config.py:SETTING,MODELS.

MODELS is a directory with the model directories "student" and "teacher".
"""

from gkdjax import config

# setting -> (on_policy_fraction, adapter, teacher.top_k, has an anchor, the teacher is no toggle)
SETTINGS = {
    "off-lora": (0.0, "lora", 8, False, False),
    "off-full": (0.0, "none", None, True, False),
    "on-lora": (0.5, "lora", 8, True, True),
    "on-full": (0.5, "none", None, True, False),
}
STEPS, SAVE_EVERY, EVAL_EVERY = 12, 2, 3
BUFFER, REFRESH_EVERY = 3, 5
PER_PROMPT, PROMPTS = 4, 12


def get_config(argument: str):
    setting, models = argument.split(",")
    on_policy, adapter, top_k, anchored, other_teacher = SETTINGS[setting]
    c = config.default()
    c.student.model = f"{models}/student"
    c.student.adapter = adapter
    c.student.lora.rank = 2
    c.student.lora.dropout = 0.1
    c.teacher.top_k = top_k
    if other_teacher:
        c.teacher.backend, c.teacher.model = "flax", f"{models}/teacher"
    c.gkd.on_policy_fraction = on_policy
    # Neither is a multiple of SAVE_EVERY: a run goes on in the middle of both.
    c.gkd.on_policy_buffer_steps = BUFFER
    c.rollout.refresh_every_steps = REFRESH_EVERY
    c.context.prefix_messages = [{"role": "system", "content": "be brief"}]
    if anchored:
        c.anchor.data = [{"prompt": f"other {i}"} for i in range(5)]
        c.anchor.batch_size = 4
    _training(c)
    _evaluation(c)
    return c


def _training(c):
    c.data.train = [{"prompt": f"ask {i}" + "!" * (i % 5)} for i in range(PROMPTS)]
    c.data.max_length = 64
    # Several shapes are several times to compile, most of all for dropout and the top k.
    c.data.bucket_lengths = (64,) if c.student.adapter == "lora" else (32, 64)
    c.rollout.per_prompt = PER_PROMPT
    c.rollout.max_new_tokens = 6
    c.context.target_content_pattern = "[a-z]"  # some responses are written again
    c.optim.learning_rate = 1e-2
    c.optim.weight_decay = 0.1
    c.train.batch_size = 4
    c.train.grad_accum_steps = 2
    c.train.epochs = None
    c.train.steps = STEPS
    c.train.export = "both" if c.student.adapter == "lora" else "merged"
    c.checkpoint.every_steps = SAVE_EVERY


def _evaluation(c):
    c.eval.questions = [{"prompt": f"tell {i}", "answer": "x"} for i in range(5)]
    c.eval.max_new_tokens = 6
    c.eval.batch_size = 4
    c.eval.every_steps = EVAL_EVERY
    c.log.tensorboard = False
    c.log.progress_bar = False
