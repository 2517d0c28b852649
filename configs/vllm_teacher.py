"""A prompted Gemma 3 12B at a vLLM server into Gemma 3 1B: the job of gemma3.py, teacher elsewhere.

Start the server where there is a GPU of 40 GB or more, in an environment of its own with vLLM:

    launch/start_vllm.sh google/gemma-3-12b-it teacher 8000

Try it, ask for its text ahead if you like, and train:

    python -m gkdjax.tools.check_teacher --config=configs/vllm_teacher.py
    python -m gkdjax.tools.cache_teacher --config=configs/vllm_teacher.py
    python -m gkdjax.main --config=configs/vllm_teacher.py

With another machine for the server: --config.teacher.api_base=http://HOST:8000/v1. Run time and
result: unknown, this mode has not been run yet.

    launch/start_vllm.sh --cpu gkdjax/config/assets/quickstart/teacher teacher 8000
    python -m gkdjax.main --config=configs/vllm_teacher.py:tiny

The same with the quickstart's models and data, on a CPU: 60 steps, half of them on-policy. Expected
on 2 CPU cores, beside the server, which takes a minute to start: two minutes, recovery 0.94 on 64
questions.
"""

import pathlib
import runpy

from gkdjax.tools import tiny_mode

HERE = pathlib.Path(__file__).parent


def get_config(mode: str = ""):
    tiny = tiny_mode.is_asked(mode, __file__)
    job = "quickstart.py" if tiny else "gemma3.py"
    c = runpy.run_path(str(HERE / job))["get_config"]()
    c.teacher.backend = "vllm"
    c.teacher.model = ""
    c.teacher.api_base = "http://127.0.0.1:8000/v1"
    c.teacher.api_model = "teacher"
    c.teacher.top_k = 20
    if tiny:
        c.gkd.on_policy_warmup_steps = 30
        c.train.steps = 60
        c.eval.every_steps = 30
        c.eval.rows = 64
        c.eval.questions = tiny_mode.first_rows(c.eval.questions, 64)
        c.eval.retention = {}
        c.data.train = tiny_mode.first_rows(c.data.train, 256)
        return c
    c.student.model = "google/gemma-3-1b-it"
    return c
