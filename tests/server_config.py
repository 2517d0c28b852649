"""The config of runs that are killed beside their server: --config=tests/server_config.py:ARGUMENT.

ARGUMENT is the student's directory and the server's address, with a comma between.
"""

from gkdjax import config

KEY_VARIABLE = "CANARY_KEY"


def get_config(argument: str):
    student, address = argument.split(",")
    c = config.default()
    c.student.model = student
    c.student.lora.rank = 2
    c.teacher.backend, c.teacher.api_base, c.teacher.top_k = "vllm", address, 8
    c.teacher.api_key_env = KEY_VARIABLE
    c.teacher.concurrency = 3
    c.context.prefix_messages = [{"role": "system", "content": "be brief"}]
    c.data.train = [{"prompt": f"ask {i}"} for i in range(8)]
    c.data.train += [{"prompt": f"tell {i}", "response": f"yes {i}"} for i in range(24)]
    c.data.max_length = 64
    c.data.bucket_lengths = (64,)
    c.rollout.per_prompt = 1
    c.rollout.max_new_tokens = 4
    c.gkd.on_policy_fraction = 0.4
    c.gkd.on_policy_buffer_steps = 3
    c.optim.learning_rate = 1e-2
    c.train.batch_size = 4
    c.train.epochs, c.train.steps = None, 20
    c.checkpoint.every_steps = 3
    c.eval.max_new_tokens = 4
    c.eval.batch_size = 4
    c.log.tensorboard = False
    c.log.progress_bar = False
    return c
