"""Every check of a config's values that needs no file; `gkdjax.config.parse` calls it.

The fields and their defaults stand in `gkdjax.config.schema`, their types are checked in
`gkdjax.config.parse`.
"""

import difflib
import re

from gkdjax.config.schema import SERVERS
from gkdjax.utils.errors import UserError

DIVERGENCES = ("forward_kl", "reverse_kl", "mixed", "generalized_jsd")  # without jax: spelt out
TOO_LONG = ("drop", "truncate-right", "truncate-left", "truncate-prefix")
MATCHES = ("keywords", "exact", "regex")
PREFIX_KEYS = ("prefix_messages", "prefix_file", "system_prompt_file", "corpus")

# How a server is reached, which changes nothing of what it says.
REACH_KEYS = ("api_base", "api_key_env", "concurrency", "timeout_s", "deadline_s", "max_retries")
REACH_KEYS += ("max_unreadable", "store", "offline", "trust_env")
# What transformers' apply_chat_template takes for itself.
RENDERING_KEYS = ("conversation", "messages", "tools", "documents", "chat_template", "tokenize")
RENDERING_KEYS += ("add_generation_prompt", "continue_final_message", "padding", "truncation")
RENDERING_KEYS += ("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask")
RENDERING_KEYS += ("tokenizer_kwargs", "sanitize_control_tokens", "gkdjax_clock")
MESH_AXES = ("data", "fsdp", "tensor")


def check(config) -> None:
    """Raises UserError for the first value of a `gkdjax.config.Config` that cannot be meant."""
    for check_section in (
        check_student,
        check_teacher,
        _check_gkd,
        _check_anchor,
        _check_context,
        _check_text,
        _check_eval,
        _check_training,
        check_mesh,
    ):
        check_section(config)


def _check_gkd(config) -> None:
    gkd = config.gkd
    choice("gkd.divergence", gkd.divergence, DIVERGENCES)
    choice("gkd.warmup_divergence", gkd.warmup_divergence, DIVERGENCES)
    choice("gkd.tail", gkd.tail, ("bucket", "renormalize"))
    choice("gkd.reduction", gkd.reduction, ("token", "example"))
    beta = gkd.jsd_beta
    require(0 <= beta <= 1, "gkd.jsd_beta", beta, "must be in [0, 1]")
    used = [gkd.divergence]
    used += [gkd.warmup_divergence] if gkd.on_policy_warmup_steps else []
    used += [config.anchor.divergence] if config.anchor.data is not None else []
    if "generalized_jsd" in used and beta in (0, 1):
        limit = "reverse_kl" if beta else "forward_kl"
        advice = f"generalized_jsd vanishes there; use {limit!r}, its limit, or 0 < beta < 1"
        require(False, "gkd.jsd_beta", beta, advice)
    fraction = gkd.on_policy_fraction
    require(0 <= fraction <= 1, "gkd.on_policy_fraction", fraction, "must be in [0, 1]")
    require(gkd.temperature > 0, "gkd.temperature", gkd.temperature, "must be positive")
    choice("gkd.on_policy_schedule", gkd.on_policy_schedule, ("constant", "linear"))
    at_least(config, 0, "gkd.on_policy_warmup_steps")
    at_least(config, 1, "gkd.on_policy_buffer_steps")
    at_least(config, 1, "gkd.chunk_size")


def _check_anchor(config) -> None:
    anchor = config.anchor
    choice("anchor.reference", anchor.reference, ("base", "teacher"))
    choice("anchor.divergence", anchor.divergence, DIVERGENCES)
    choice("anchor.tokens", anchor.tokens, ("response", "all"))
    _check_anchor_sets(anchor)
    at_least(config, 1, "anchor.batch_size")


def _check_anchor_sets(anchor) -> None:
    names = list(anchor.data) if isinstance(anchor.data, dict) else []
    for name in names:
        fits = re.fullmatch(r"[A-Za-z0-9_-]+", name)  # it becomes part of a file's name
        advice = "the name of an anchor set has letters, digits, _ and - only"
        require(fits is not None, "anchor.data", name, advice)
    require(anchor.data != {}, "anchor.data", {}, "names no set; for no anchor, set it to None")
    weights = anchor.weight
    if isinstance(weights, dict):
        advice = "anchor.data is a single set, whose weight is a number"
        if names:
            advice = f"must have a weight for each set of anchor.data, {', '.join(names)}"
        require(set(weights) == set(names) != set(), "anchor.weight", weights, advice)
    else:
        weights = {"": weights}
    for name, weight in weights.items():
        require(weight > 0, ".".join(filter(None, ("anchor.weight", name))), weight, "must be > 0")


def _check_messages(key: str, messages: tuple[dict, ...]) -> None:
    for message in messages:
        fits = set(message) == {"role", "content"} and all(
            isinstance(value, str) for value in message.values()
        )
        require(fits, key, message, "each message is {'role': str, 'content': str}")


def _check_context(config) -> None:
    context = config.context
    given = [key for key in PREFIX_KEYS if getattr(context, key)]
    for other in given[1:]:
        advice = f"context.{given[0]} is set as well; a run has one global prefix, keep one of them"
        require(False, f"context.{other}", getattr(context, other), advice)
    if context.history_as_prefix and given:
        advice = f"every row has the prefix of context.{given[0]} then; leave one of the two out"
        require(False, "context.history_as_prefix", True, advice)
    _check_messages("context.prefix_messages", context.prefix_messages)
    _check_messages("eval.other_prefix", config.eval.other_prefix)
    template = context.corpus_template
    advice = "has no {corpus}, where the documents are to stand"
    require("{corpus}" in template, "context.corpus_template", template, advice)
    if not context.corpus and template != type(context).corpus_template:
        require(False, "context.corpus_template", template, "is for context.corpus; set it too")
    if "assistant" not in context.target_roles:
        advice = "an on-policy batch learns the student's text: it has to have 'assistant'"
        off_policy = config.gkd.on_policy_fraction == 0
        require(off_policy, "context.target_roles", context.target_roles, advice)
    require(len(context.target_roles) > 0, "context.target_roles", (), "names no role to train")
    at_least(config, 0, "context.student_retained_turns")
    pattern, span = context.target_content_pattern, context.target_span
    if pattern is not None:
        regular("context.target_content_pattern", pattern)
    choice("context.target_span", span, ("message", "match"))
    advice = "of what? Set context.target_content_pattern to the regular expression that is meant"
    require(span == "message" or pattern is not None, "context.target_span", span, advice)


def _check_text(config) -> None:
    for key in config.data.template_kwargs:
        advice = "is for the rendering and not for the template, and set by the run; leave it out"
        require(key not in RENDERING_KEYS, "data.template_kwargs", {key: "..."}, advice)
    at_least(config, 0, "rollout.temperature")
    at_least(config, 1, "rollout.per_prompt", "rollout.max_new_tokens")
    at_least(config, 0, "rollout.max_retries")
    top_p = config.rollout.top_p
    require(0 < top_p <= 1, "rollout.top_p", top_p, "must be in (0, 1]")
    at_least_or_none(config, 1, "rollout.top_k")
    at_least_or_none(config, 1, "train.max_seconds")
    at_least_or_none(config, 1, "rollout.refresh_every_steps")
    require(config.data.train != "", "data.train", "", "name a file or a dataset, or give rows")
    choice("data.too_long", config.data.too_long, TOO_LONG)
    choice("data.bad_rows", config.data.bad_rows, ("refuse", "drop"))
    at_least(config, 2, "data.max_length")
    for length in config.data.bucket_lengths:
        require(length >= 1, "data.bucket_lengths", length, "must be at least 1")
    share = config.data.validation
    if isinstance(share, float):
        require(0 < share < 1, "data.validation", share, "a share of data.train is in (0, 1)")
    require(share != "", "data.validation", "", "name a file or a dataset, or set it to None")


def _check_eval(config) -> None:
    asked = config.eval
    at_least(config, 1, "eval.max_new_tokens", "eval.batch_size", "eval.rows")
    choice("eval.match", asked.match, MATCHES)
    at_least_or_none(config, 1, "eval.every_steps")
    for step in asked.at_steps:
        require(step >= 0, "eval.at_steps", step, "must be at least 0")
    measured = (asked.questions, asked.prompts, config.data.validation)
    measured += (asked.side_effects, asked.retention or None)
    for key in ("every_steps", "at_steps"):
        value = getattr(asked, key)
        advice = "nothing to measure on: set eval.questions, eval.prompts or data.validation"
        require(not value or measured != (None,) * 5, f"eval.{key}", value, advice)
    for name in asked.retention:
        advice = "that is the name of another set in the results; choose another"
        require(name not in ("questions", "heldout"), "eval.retention", name, advice)
    if asked.other_prefix:
        advice = "it is read before the questions: set eval.questions or eval.prompts"
        given = asked.questions is not None or asked.prompts is not None
        require(given, "eval.other_prefix", asked.other_prefix, advice)
    scheduled = asked.every_steps is not None or asked.at_steps
    advice = "nothing is measured on the way: set eval.every_steps or eval.at_steps"
    keep = config.checkpoint.keep_evaluated
    require(scheduled or not keep, "checkpoint.keep_evaluated", keep, advice)


def _check_training(config) -> None:
    optim, train = config.optim, config.train
    require(optim.learning_rate > 0, "optim.learning_rate", optim.learning_rate, "must be > 0")
    choice("optim.schedule", optim.schedule, ("cosine", "linear", "constant"))
    require(0 <= optim.warmup_ratio < 1, "optim.warmup_ratio", optim.warmup_ratio, "is in [0, 1)")
    require(optim.max_grad_norm > 0, "optim.max_grad_norm", optim.max_grad_norm, "must be > 0")
    at_least(config, 0, "optim.weight_decay", "train.seed")
    at_least(config, 1, "train.batch_size", "train.grad_accum_steps", "train.max_bad_steps")
    at_least(config, 1, "checkpoint.every_steps", "checkpoint.max_to_keep")
    one_given = (train.epochs is None) != (train.steps is None)
    require(one_given, "train.steps", train.steps, "give train.epochs or train.steps, one as None")
    length = train.epochs if train.steps is None else train.steps
    require(length > 0, "train.epochs or train.steps", length, "must be positive")
    in_parts = {"train.batch_size": train.batch_size}
    if config.anchor.data is not None:
        in_parts["anchor.batch_size"] = config.anchor.batch_size
    for key, rows in in_parts.items():
        advice = f"must be a multiple of train.grad_accum_steps = {train.grad_accum_steps}"
        require(rows % train.grad_accum_steps == 0, key, rows, advice)
    choice("train.matmul_precision", train.matmul_precision, ("default", "high", "highest"))
    choice("train.export", train.export, ("merged", "adapter", "both"))
    if config.student.adapter == "none":
        advice = "without an adapter (student.adapter='none') only 'merged' can be exported"
        require(train.export == "merged", "train.export", train.export, advice)


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
        student.adapter == "lora" or not lora.init_from,
        "student.lora.init_from",
        lora.init_from,
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
    drawn = config.rollout.temperature
    # It tells the logprobs of what it draws at that temperature, and the teacher's are those at 1.
    told = teacher.backend != "sglang" or drawn in (0, 1)
    require(told, "rollout.temperature", drawn, "an SGLang server has to draw at 1.0, or at 0")
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


def require(holds: bool, key: str, value, what: str) -> None:
    """`what` says what it must be, or what to do instead."""
    if not holds:
        raise UserError(f"config.{key} = {value!r}: {what}")


def choice(key: str, value, choices: tuple) -> None:
    near = difflib.get_close_matches(str(value), choices, n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(choices)}"
    require(value in choices, key, value, advice)


def regular(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        require(False, key, pattern, f"is no regular expression: {error}")


def at_least(config, least: float, *keys: str) -> None:
    for key in keys:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        require(value >= least, key, value, f"must be at least {least}")


def at_least_or_none(config, least: int, key: str) -> None:
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    require(value is None or value >= least, key, value, f"must be at least {least}, or None")
