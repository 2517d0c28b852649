r"""A teacher at any OpenAI-compatible endpoint that returns logprobs, as hosts and llama-server do.

    export TEACHER_API_KEY=...  # never in a config
    python -m gkdjax.main --config=configs/openai_teacher.py \
        --config.teacher.api_base=https://HOST/v1 --config.teacher.api_model=gemma-3-27b-it

Most such endpoints do not score text that they are given: the student learns the teacher's own
samples, with the logprobs that came with them. So there is no on-policy text here, and no row
brings a response. The teacher's tokenizer has to be the student's: for this one another Gemma 3.

Ask for the text ahead, with an estimate of its price first:

    python -m gkdjax.tools.cache_teacher --config=configs/openai_teacher.py --estimate \
        --input_price=0.1 --output_price=0.2

Run time and result: unknown, this mode has not been run yet.

    launch/start_vllm.sh --cpu gkdjax/config/assets/quickstart/teacher teacher 8000
    python -m gkdjax.main --config=configs/openai_teacher.py:tiny

The same with the quickstart's models and data, on a CPU: 60 steps. Expected on 2 CPU cores, beside
the server, which takes a minute to start: 75 seconds, recovery 0.83 on 64 questions.
"""

import pathlib
import runpy

from gkdjax.tools import tiny_mode

HERE = pathlib.Path(__file__).parent


def get_config(mode: str = ""):
    tiny = tiny_mode.is_asked(mode, __file__)
    c = runpy.run_path(str(HERE / "vllm_teacher.py"))["get_config"](mode)
    c.teacher.backend = "openai"
    c.gkd.on_policy_fraction = 0.0
    c.gkd.on_policy_warmup_steps = 0
    c.gkd.divergence = "forward_kl"
    if tiny:
        return c
    c.teacher.api_base = "https://127.0.0.1/v1"  # the host's
    c.teacher.api_model = "gemma-3-27b-it"
    c.teacher.api_key_env = "TEACHER_API_KEY"
    c.teacher.concurrency = 8
    return c
