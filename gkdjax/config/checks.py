"""Checks of keys that depend on each other, and of texts; `gkdjax.config.parse` calls them.

The values that one key takes are in its type, in `gkdjax.config.schema`.
"""

import difflib
import functools
import re

from gkdjax.config.schema import MESH_AXES, PREFIX_KEYS, REACH_KEYS, SERVERS, Config
from gkdjax.utils.errors import UserError

# What transformers' apply_chat_template takes for itself.
_RENDERING_KEYS = ("conversation", "messages", "tools", "documents", "chat_template", "tokenize")
_RENDERING_KEYS += ("add_generation_prompt", "continue_final_message", "padding", "truncation")
_RENDERING_KEYS += ("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask")
_RENDERING_KEYS += ("tokenizer_kwargs", "sanitize_control_tokens", "gkdjax_clock")


def check(config: Config) -> None:
    """Raises UserError for the first values that cannot be meant together."""
    for check_section in (
        _check_student,
        _check_teacher,
        _check_gkd,
        _check_anchor,
        _check_context,
        _check_data,
        _check_eval,
        _check_training,
        _check_mesh,
    ):
        check_section(config, functools.partial(_require, config))


def choice(key: str, value, choices: tuple) -> None:
    """Raises UserError, with the nearest choice, for a value that is none of them."""
    if value not in choices or type(value) is not type(choices[0]):
        near = difflib.get_close_matches(str(value), choices, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(choices)}"
        if (key, value) == ("teacher.backend", "hf"):
            advice = "another checkpoint in this process is called 'flax' here"
        refuse(key, value, advice)


def refuse(key: str, value, advice: str) -> None:
    raise UserError(f"config.{key} = {value!r}: {advice}")


def _require(config: Config, holds: bool, key: str, advice: str) -> None:
    """`advice`: what the value of the key must be, or what to do instead."""
    if not holds:
        refuse(key, functools.reduce(getattr, key.split("."), config), advice)


def _require_regular(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        refuse(key, pattern, f"is no regular expression: {error}")


def _check_gkd(config: Config, require) -> None:
    gkd = config.gkd
    used = [gkd.divergence]
    used += [gkd.warmup_divergence] if gkd.on_policy_warmup_steps else []
    used += [config.anchor.divergence] if config.anchor.data is not None else []
    vanishes = "generalized_jsd" in used and gkd.jsd_beta in (0, 1)
    limit = "reverse_kl" if gkd.jsd_beta else "forward_kl"
    advice = f"generalized_jsd vanishes there; use {limit!r}, its limit, or 0 < beta < 1"
    require(not vanishes, "gkd.jsd_beta", advice)


def _check_anchor(config: Config, require) -> None:
    data, weight = config.anchor.data, config.anchor.weight
    names = list(data) if isinstance(data, dict) else []
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):  # it becomes part of a file's name
            advice = "the name of an anchor set has letters, digits, _ and - only"
            refuse("anchor.data", name, advice)
    require(data != {}, "anchor.data", "names no set; for no anchor, set it to None")
    if isinstance(weight, dict):
        advice = "anchor.data is a single set, whose weight is a number"
        if names:
            advice = f"must have a weight for each set of anchor.data, {', '.join(names)}"
        require(set(weight) == set(names) != set(), "anchor.weight", advice)


def _check_context(config: Config, require) -> None:
    context = config.context
    given = [key for key in PREFIX_KEYS if getattr(context, key)]
    for other in given[1:]:
        advice = f"context.{given[0]} is set as well; a run has one global prefix, keep one of them"
        require(False, f"context.{other}", advice)
    if given:
        advice = f"every row has the prefix of context.{given[0]} then; leave one of the two out"
        require(not context.history_as_prefix, "context.history_as_prefix", advice)
    template = context.corpus_template
    advice = "has no {corpus}, where the documents are to stand"
    require("{corpus}" in template, "context.corpus_template", advice)
    unused = not context.corpus and template != type(context).corpus_template
    require(not unused, "context.corpus_template", "is for context.corpus; set it too")
    advice = "an on-policy batch learns the student's text: it has to have 'assistant'"
    trained = "assistant" in context.target_roles or config.gkd.on_policy_fraction == 0
    require(trained, "context.target_roles", advice)
    require(len(context.target_roles) > 0, "context.target_roles", "names no role to train")
    if context.target_content_pattern is not None:
        _require_regular("context.target_content_pattern", context.target_content_pattern)
    else:
        advice = "of what? Set context.target_content_pattern to the regular expression that is"
        require(context.target_span == "message", "context.target_span", f"{advice} meant")


def _check_data(config: Config, require) -> None:
    for key in config.data.template_kwargs:
        if key in _RENDERING_KEYS:
            advice = "is for the rendering and not for the template, and set by the run; leave it"
            refuse("data.template_kwargs", {key: "..."}, f"{advice} out")
    require(config.data.train != "", "data.train", "name a file or a dataset, or give rows")
    advice = "name a file or a dataset, or set it to None"
    require(config.data.validation != "", "data.validation", advice)


def _check_eval(config: Config, require) -> None:
    chosen = config.eval
    measured = (chosen.questions, chosen.prompts, config.data.validation, chosen.side_effects)
    nothing = measured == (None,) * 4 and not chosen.retention
    for key in ("every_steps", "at_steps"):
        advice = "nothing to measure on: set eval.questions, eval.prompts or data.validation"
        require(not (getattr(chosen, key) and nothing), f"eval.{key}", advice)
    for name in chosen.retention:
        if name in ("questions", "heldout"):
            advice = "that is the name of another set in the results; choose another"
            refuse("eval.retention", name, advice)
    advice = "it is read before the questions: set eval.questions or eval.prompts"
    asked = chosen.questions is not None or chosen.prompts is not None
    require(asked or not chosen.other_prefix, "eval.other_prefix", advice)
    scheduled = chosen.every_steps is not None or chosen.at_steps
    advice = "nothing is measured on the way: set eval.every_steps or eval.at_steps"
    kept = config.checkpoint.keep_evaluated
    require(scheduled or not kept, "checkpoint.keep_evaluated", advice)


def _check_training(config: Config, require) -> None:
    train = config.train
    one_given = (train.epochs is None) != (train.steps is None)
    require(one_given, "train.steps", "give train.epochs or train.steps, one as None")
    in_parts = {"train.batch_size": train.batch_size}
    if config.anchor.data is not None:
        in_parts["anchor.batch_size"] = config.anchor.batch_size
    for key, rows in in_parts.items():
        advice = f"must be a multiple of train.grad_accum_steps = {train.grad_accum_steps}"
        require(rows % train.grad_accum_steps == 0, key, advice)


def _check_student(config: Config, require) -> None:
    student = config.student
    require(student.model != "", "student.model", "name a Hugging Face directory or hub id")
    if student.adapter == "none":
        advice = "there is no adapter with student.adapter='none'"
        require(not student.lora.init_from, "student.lora.init_from", advice)
        advice = "without an adapter (student.adapter='none') only 'merged' can be exported"
        require(config.train.export == "merged", "train.export", advice)
    if student.lora.targets != "all-linear":
        for target in student.lora.targets:
            _require_regular("student.lora.targets", target)
    require(len(student.lora.targets) > 0, "student.lora.targets", "names no kernel")


def _check_teacher(config: Config, require) -> None:
    teacher = config.teacher
    if teacher.is_server:
        _check_server(config, require)
    else:
        for key in ("api_model", *REACH_KEYS):
            advice = f"is for servers; set teacher.backend to one of {', '.join(SERVERS)}"
            unset = getattr(teacher, key) == getattr(type(teacher), key)
            require(unset, f"teacher.{key}", advice)
    advice = "the flax teacher needs a directory or hub id"
    require(teacher.model != "" or not teacher.is_model, "teacher.model", advice)
    for key in ("model", "tokenizer") if teacher.is_base else ():
        advice = "local-toggle has nothing of its own but an adapter; set teacher.backend='flax'"
        require(getattr(teacher, key) == "", f"teacher.{key}", advice)


def _check_server(config: Config, require) -> None:
    teacher, gkd = config.teacher, config.gkd
    for key in ("model", "adapter", "dtype"):
        advice = "is of a teacher in this process; the server has its own"
        advice += ", name it in teacher.api_model" if key != "dtype" else ""
        require(not getattr(teacher, key), f"teacher.{key}", advice)
    if teacher.offline:
        advice = "teacher.offline=True answers from the store; name its file"
        require(teacher.store is not None, "teacher.store", advice)
        advice = "no store has what the student will write; set it to 0, or teacher.offline=False"
        require(gkd.on_policy_fraction == 0, "gkd.on_policy_fraction", advice)
    else:
        advice = "name the server's address, as http://127.0.0.1:8000/v1"
        require(teacher.api_base != "", "teacher.api_base", advice)
    # These two values are not repeated: they may hold a key, and a message may be logged.
    if any(sign in teacher.api_base for sign in "@?#"):
        raise UserError(
            "config.teacher.api_base is an address without a user, a password or a query; a key"
            " goes into the environment variable that config.teacher.api_key_env names"
        )
    if teacher.api_key_env and not re.fullmatch("[A-Z_][A-Z0-9_]*", teacher.api_key_env):
        raise UserError(
            "config.teacher.api_key_env is the name of the environment variable that holds the key,"
            " in capital letters, as TEACHER_API_KEY; never the key itself"
        )
    # SGLang's logprobs are those at the sampling temperature, and the teacher's are those at 1.
    fits = teacher.backend != "sglang" or config.rollout.temperature in (0, 1)
    require(fits, "rollout.temperature", "an SGLang server has to sample at 1.0, or at 0")
    fits = gkd.temperature == 1 or gkd.tail == "renormalize"
    advice = "a server's probabilities are those of temperature 1; set it to 1.0, or gkd.tail to"
    require(fits, "gkd.temperature", f"{advice} 'renormalize'")


def _check_mesh(config: Config, require) -> None:
    sizes = {key: getattr(config.mesh, key) for key in (*MESH_AXES, "dcn_data")}
    for key, size in sizes.items():
        advice = "is a number of devices, or -1 for what the others leave"
        require(size >= 1 or size == -1, f"mesh.{key}", advice)
    open_axes = [key for key, size in sizes.items() if size == -1]
    for key in open_axes[1:]:
        require(False, f"mesh.{key}", f"mesh.{open_axes[0]} is -1 as well; one size can be")
    advice = (
        "a teacher that is the student's base is sharded as the student: set mesh.student_rules"
    )
    require(
        not (config.mesh.teacher_rules and config.teacher.is_base), "mesh.teacher_rules", advice
    )
    for key in ("student_rules", "teacher_rules"):
        for rule in getattr(config.mesh, key):
            _require_regular(f"mesh.{key}", rule["leaves"])
            named = [axis for axis in rule["axes"] if axis is not None]
            if len(set(named)) != len(named):
                refuse(f"mesh.{key}", rule, "an axis shards one dimension only")
