"""Checks of a config's values that say which models there are, and on which devices."""

import re

from gkdjax.config_require import at_least, at_least_or_none, choice, regular, require
from gkdjax.errors import UserError

SERVERS = ("vllm", "sglang", "openai")
# How a server is reached, which changes nothing of what it says.
REACH_KEYS = ("api_base", "api_key_env", "concurrency", "timeout_s", "deadline_s", "max_retries")
REACH_KEYS += ("max_unreadable", "store", "offline", "trust_env")
MESH_AXES = ("data", "fsdp", "tensor")


def check_student(config) -> None:
    student = config.student
    require(student.model != "", "student.model", "", "name a Hugging Face directory or hub id")
    if student.dtype is not None:
        choice("student.dtype", student.dtype, ("float32", "bfloat16", "float16"))
    choice("student.compute_dtype", student.compute_dtype, ("float32", "bfloat16"))
    choice("student.adapter", student.adapter, ("lora", "none"))
    lora = student.lora
    advice = "there is no adapter with student.adapter='none'"
    require(
        student.adapter == "lora" or not lora.start_from,
        "student.lora.start_from",
        lora.start_from,
        advice,
    )
    require(lora.rank >= 1, "student.lora.rank", lora.rank, "must be at least 1")
    require(lora.alpha > 0, "student.lora.alpha", lora.alpha, "must be positive")
    require(0 <= lora.dropout < 1, "student.lora.dropout", lora.dropout, "must be in [0, 1)")
    if isinstance(lora.targets, str):
        choice("student.lora.targets", lora.targets, ("all-linear",))
    else:
        for target in lora.targets:
            regular("student.lora.targets", target)
    require(len(lora.targets) > 0, "student.lora.targets", lora.targets, "names no kernel")


def check_teacher(config) -> None:
    teacher = config.teacher
    require(
        teacher.backend != "hf",
        "teacher.backend",
        "hf",
        "another checkpoint in this process is called 'flax' here",
    )
    choice("teacher.backend", teacher.backend, ("local-toggle", "flax", *SERVERS))
    if teacher.backend in SERVERS:
        _check_server(config)
    else:
        for key in ("api_model", *REACH_KEYS):
            advice = f"is for servers; set teacher.backend to one of {', '.join(SERVERS)}"
            value = getattr(teacher, key)
            require(value == getattr(type(teacher), key), f"teacher.{key}", value, advice)
    if teacher.backend == "flax":
        require(
            teacher.model != "", "teacher.model", "", "the flax teacher needs a directory or hub id"
        )
    if teacher.backend == "local-toggle":
        advice = "local-toggle has nothing of its own but an adapter; set teacher.backend='flax'"
        require(teacher.model == "", "teacher.model", teacher.model, advice)
        require(teacher.tokenizer == "", "teacher.tokenizer", teacher.tokenizer, advice)
    at_least(config, 0, "teacher.prefix_bytes")
    if teacher.dtype is not None:
        choice("teacher.dtype", teacher.dtype, ("float32", "bfloat16", "float16"))
    at_least_or_none(config, 1, "teacher.top_k")


def _check_server(config) -> None:
    teacher, gkd = config.teacher, config.gkd
    for key, instead in (("model", "api_model"), ("adapter", "api_model"), ("dtype", None)):
        advice = "is of a teacher in this process; the server has its own"
        advice += f", name it in teacher.{instead}" if instead else ""
        require(not getattr(teacher, key), f"teacher.{key}", getattr(teacher, key), advice)
    if teacher.offline:
        advice = "teacher.offline=True answers from the store; name its file"
        require(teacher.store is not None, "teacher.store", None, advice)
        advice = "no store has what the student will write; set it to 0, or teacher.offline=False"
        fraction = gkd.on_policy_fraction
        require(fraction == 0, "gkd.on_policy_fraction", fraction, advice)
    else:
        advice = "name the server's address, as http://127.0.0.1:8000/v1"
        require(teacher.api_base != "", "teacher.api_base", "", advice)
    if any(sign in teacher.api_base for sign in "@?#"):
        # It is not repeated: it would be in the log, and RUN/config.json, with what it holds.
        raise UserError(
            "config.teacher.api_base is an address without a user, a password or a query; a key"
            " goes into the environment variable that config.teacher.api_key_env names"
        )
    if teacher.api_key_env and not re.fullmatch("[A-Z_][A-Z0-9_]*", teacher.api_key_env):
        # Whatever it is, it is not repeated: it may be the key itself.
        raise UserError(
            "config.teacher.api_key_env is the name of the environment variable that holds the key,"
            " in capital letters, as TEACHER_API_KEY; never the key itself"
        )
    at_least(config, 1, "teacher.concurrency")
    at_least(config, 0, "teacher.max_retries")
    for key in ("timeout_s", "deadline_s"):
        value = getattr(teacher, key)
        require(value > 0, f"teacher.{key}", value, "must be positive, in seconds")
    share = teacher.max_unreadable
    require(0 <= share <= 1, "teacher.max_unreadable", share, "is a share, from 0 to 1")
    drawn = config.trajectory.temperature
    # It tells the logprobs of what it draws at that temperature, and the teacher's are those at 1.
    told = teacher.backend != "sglang" or drawn in (0, 1)
    require(told, "trajectory.temperature", drawn, "an SGLang server has to draw at 1.0, or at 0")
    retempered = gkd.temperature == 1 or gkd.tail == "renormalize"
    advice = "a server's probabilities are those of temperature 1; set it to 1.0, or gkd.tail to"
    require(retempered, "gkd.temperature", gkd.temperature, f"{advice} 'renormalize'")


def check_mesh(config) -> None:
    sizes = {key: getattr(config.mesh, key) for key in (*MESH_AXES, "dcn_data")}
    for key, size in sizes.items():
        what = "is a number of devices, or -1 for what the others leave"
        require(size >= 1 or size == -1, f"mesh.{key}", size, what)
    open_axes = [key for key, size in sizes.items() if size == -1]
    for key in open_axes[1:]:
        require(False, f"mesh.{key}", -1, f"mesh.{open_axes[0]} is -1 as well; one size can be")
    advice = "a teacher that is the student's base lies as the student does: set mesh.student_rules"
    own = not config.mesh.teacher_rules or config.teacher.backend != "local-toggle"
    require(own, "mesh.teacher_rules", config.mesh.teacher_rules, advice)
    for key in ("student_rules", "teacher_rules"):
        for rule in getattr(config.mesh, key):
            _check_rule(f"mesh.{key}", rule)


def _check_rule(key: str, rule: dict) -> None:
    what = "is {'leaves': a regular expression of paths, 'axes': a list of axes or None}"
    fits = set(rule) == {"leaves", "axes"} and isinstance(rule["leaves"], str)
    require(fits and isinstance(rule["axes"], list | tuple), key, rule, what)
    regular(key, rule["leaves"])
    named = [axis for axis in rule["axes"] if axis is not None]
    for axis in named:
        choice(key, axis, MESH_AXES)
    require(len(set(named)) == len(named), key, rule, "an axis cuts one dimension only")
