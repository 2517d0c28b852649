"""Configs of the runs that are killed: --config=tests/resume_config.py:SETTING,MODELS.

MODELS is a directory with the model directory "student".
"""

from small_runs import small

# setting -> (on_policy_fraction, adapter, teacher.top_k, has an anchor)
SETTINGS = {"off-lora": (0.0, "lora", 8, False), "on-full": (0.5, "none", None, True)}
STEPS, SAVE_EVERY, EVAL_EVERY = 12, 2, 3
PER_PROMPT, PROMPTS = 4, 12


def get_config(argument: str):
    setting, models = argument.split(",")
    on_policy, adapter, top_k, anchored = SETTINGS[setting]
    changes = {
        "student__adapter": adapter,
        "student__lora__dropout": 0.1,
        "teacher__top_k": top_k,
        "gkd__on_policy_fraction": on_policy,
        # Neither is a multiple of SAVE_EVERY: a run goes on in the middle of both.
        "gkd__on_policy_buffer_steps": 3,
        "rollout__refresh_every_steps": 5,
        "context__target_content_pattern": "[a-z]",  # some responses are written again
        "data__train": [{"prompt": f"ask {i}" + "!" * (i % 5)} for i in range(PROMPTS)],
        # Several shapes are several times to compile, most of all for dropout and the top k.
        "data__bucket_lengths": (64,) if adapter == "lora" else (32, 64),
        "rollout__per_prompt": PER_PROMPT,
        "rollout__max_new_tokens": 6,
        "optim__weight_decay": 0.1,
        "train__grad_accum_steps": 2,
        "train__steps": STEPS,
        "train__export": "both" if adapter == "lora" else "merged",
        "checkpoint__every_steps": SAVE_EVERY,
        "eval__questions": [{"prompt": f"tell {i}", "answer": "x"} for i in range(5)],
        "eval__max_new_tokens": 6,
        "eval__every_steps": EVAL_EVERY,
    }
    if anchored:
        changes["anchor__data"] = [{"prompt": f"other {i}"} for i in range(5)]
    return small(f"{models}/student", **changes)
