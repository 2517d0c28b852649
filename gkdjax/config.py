"""The configuration: every key and default in `default()`, every check in `parse()`.

A config file's `get_config()` starts from `default()` and changes what it wants; flags change the
rest. `parse` turns the result into frozen dataclasses; nothing after it reads a ConfigDict or
knows a default. This module imports no jax, so that a bad value is answered at once.
"""

import dataclasses
import difflib
import math
import pathlib
import types
import typing

from ml_collections import config_dict

from gkdjax.errors import UserError

DIVERGENCES = ("forward_kl", "reverse_kl", "mixed", "generalized_jsd")
ASSETS = pathlib.Path(__file__).parent / "assets"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters, as in `gkdjax.lora`."""

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.05
    # Kernel names, regular expressions of whole paths ("layers/[qkv]_proj"), or "all-linear".
    targets: tuple[str, ...] | str = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


@dataclasses.dataclass(frozen=True)
class Student:
    """Who learns."""

    model: str = ""  # a Hugging Face directory
    dtype: str | None = None  # of a frozen base; None: the checkpoint's
    compute_dtype: str = "float32"  # of the matrix products: float32 or bfloat16
    adapter: str = "lora"  # "lora", or "none" to train every parameter
    lora: Lora = dataclasses.field(default_factory=Lora)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Who is learnt from."""

    backend: str = "local-toggle"  # the student's base with the adapter off; or "flax"
    model: str = ""  # flax: a Hugging Face directory
    dtype: str | None = None  # flax: None: the checkpoint's
    top_k: int | None = None  # None: the whole vocabulary, exactly; K: its best K and their rest


@dataclasses.dataclass(frozen=True)
class Gkd:
    """What is minimised, and on whose text."""

    divergence: str = "mixed"
    jsd_beta: float = 0.0  # mixed: weight of the reverse KL; generalized_jsd: the paper's beta
    temperature: float = 1.0  # divides both sides' logits
    tail: str = "bucket"  # with teacher.top_k: "bucket" or "renormalize"
    on_policy_fraction: float = 0.0  # of the batches: the student writes the responses
    on_policy_warmup_steps: int = 0  # the first steps are off-policy whatever the fraction
    warmup_divergence: str = "forward_kl"  # their loss


@dataclasses.dataclass(frozen=True)
class Context:
    """What the teacher reads and the student has to know without."""

    prefix_messages: tuple[dict, ...] = ()  # {"role": ..., "content": ...} each
    student_retained_turns: int = 0  # the student still sees the last n messages of the prefix
    target_roles: tuple[str, ...] = ("assistant",)


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A KL on other prompts that keeps the rest of the student as it was."""

    data: str | tuple[dict, ...] | None = None  # a file or rows; None: no anchor
    weight: float = 1.0
    towards: str = "base"  # or "teacher"
    divergence: str = "forward_kl"
    tokens: str = "response"  # or "all": the messages of the prompt count too
    batch_size: int = 8


@dataclasses.dataclass(frozen=True)
class TrajectoryConfig:
    """How responses are written where the data bring none."""

    per_prompt: int = 4
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.9


@dataclasses.dataclass(frozen=True)
class Data:
    """Training rows."""

    train: str | tuple[dict, ...] = ""  # a .json or .jsonl file, or the rows themselves
    max_length: int = 2048  # tokens of the longer view, response included
    too_long: str = "drop"  # or "truncate": the response loses its end
    bucket_lengths: tuple[int, ...] = ()  # padded lengths; (): 32, 48, 64, 96, ... max_length


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW and its schedule."""

    learning_rate: float = 2e-4
    schedule: str = "cosine"  # "cosine", "linear" (both to 0) or "constant"
    warmup_ratio: float = 0.03  # of all steps, from 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, how large, from which seed."""

    epochs: float | None = 1.0
    steps: int | None = None  # optimizer steps; set it and epochs to None, or the other way
    batch_size: int = 8  # rows of one optimizer step
    accumulation: int = 1  # parts that such a batch is computed in, one after the other
    remat: bool = False
    seed: int = 0
    export: str = "merged"  # "merged", "adapter" or "both"


@dataclasses.dataclass(frozen=True)
class Eval:
    """What is asked at the end."""

    questions: str | tuple[dict, ...] | None = None  # rows with an answer
    retention: dict[str, str] = dataclasses.field(default_factory=dict)  # ability -> file
    other_prefixes: str | None = None  # questions that bring prefixes of their own
    max_new_tokens: int = 100
    batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Orbax."""

    every_steps: int = 100
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class Log:
    """What is shown and kept of each step."""

    tensorboard: bool = True
    progress_bar: bool = True


@dataclasses.dataclass(frozen=True)
class Config:
    """All of it, checked."""

    student: Student = dataclasses.field(default_factory=Student)
    teacher: Teacher = dataclasses.field(default_factory=Teacher)
    gkd: Gkd = dataclasses.field(default_factory=Gkd)
    context: Context = dataclasses.field(default_factory=Context)
    anchor: Anchor = dataclasses.field(default_factory=Anchor)
    trajectory: TrajectoryConfig = dataclasses.field(default_factory=TrajectoryConfig)
    data: Data = dataclasses.field(default_factory=Data)
    optim: Optim = dataclasses.field(default_factory=Optim)
    train: Train = dataclasses.field(default_factory=Train)
    eval: Eval = dataclasses.field(default_factory=Eval)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    log: Log = dataclasses.field(default_factory=Log)


def default() -> config_dict.ConfigDict:
    """Every key with its default, as a ConfigDict that refuses unknown keys."""
    return _to_config_dict(Config())


def to_dict(config: Config) -> dict:
    """Plain dicts, lists and scalars, as written to a run's config.json."""
    return dataclasses.asdict(config)


def parse(raw: config_dict.ConfigDict | dict) -> Config:
    """Turns a ConfigDict into dataclasses, with every check that needs no file.

    Raises:
      UserError: naming the key, the value, and what would be right.
    """
    raw = raw.to_dict() if isinstance(raw, config_dict.ConfigDict) else raw
    config = _build(Config, raw, "")
    for check in (_check_student, _check_teacher, _check_gkd, _check_text, _check_training):
        check(config)
    return config


def check_key(path: str) -> None:
    """Raises UserError, with the nearest key, if "train.sede" is no key of the config."""
    section, hints = Config, typing.get_type_hints(Config)
    walked = ""
    for name in path.split("."):
        if name not in hints:
            _unknown(walked + name, hints, walked)
        walked += name + "."
        section = hints[name]
        hints = typing.get_type_hints(section) if dataclasses.is_dataclass(section) else {}


def _to_config_dict(section) -> config_dict.ConfigDict:
    """Scalars keep their type in the ConfigDict; what may hold several types is left open there."""
    result = config_dict.ConfigDict()
    hints = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            result[field.name] = _to_config_dict(value)
        elif hints[field.name] in (str, int, float, bool):
            result[field.name] = value
        else:
            result[field.name] = config_dict.FieldReference(value, field_type=object)
    return result.lock()


def _build(cls, raw: dict, prefix: str):
    hints = typing.get_type_hints(cls)
    for name in raw:
        if name not in hints:
            _unknown(prefix + name, hints, prefix)
    for name in hints:
        if name not in raw:
            raise UserError(f"config.{prefix}{name} is missing: start from config.default()")
    return cls(**{name: _value(hint, raw[name], prefix + name) for name, hint in hints.items()})


def _unknown(key: str, hints: dict, prefix: str):
    near = difflib.get_close_matches(key.removeprefix(prefix), hints, n=1, cutoff=0.5)
    advice = f"did you mean config.{prefix}{near[0]}?" if near else f"there are {sorted(hints)}"
    raise UserError(f"unknown key config.{key}: {advice}")


def _value(hint, value, key: str):
    """`value` as the hinted type; lists become tuples, and an int may stand for a float."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"config.{key} is a section, not {value!r}")
        return _build(hint, value, key + ".")
    if isinstance(hint, types.UnionType):
        for option in typing.get_args(hint):
            try:
                return _value(option, value, key)
            except UserError:
                continue
        raise UserError(f"config.{key} must be {_readable(hint)}, not {value!r}")
    if hint is float and type(value) is int:
        return float(value)
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_value(typing.get_args(hint)[0], item, key) for item in value)
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        return {str(name): _value(typing.get_args(hint)[1], v, key) for name, v in value.items()}
    if type(value) is not (typing.get_origin(hint) or hint):
        raise UserError(f"config.{key} must be {_readable(hint)}, not {value!r}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"config.{key} must be a finite number, not {value!r}")
    return value


def _readable(hint) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_readable(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_readable(typing.get_args(hint)[0])}"
    if hint is types.NoneType:
        return "None"
    return {dict: "dict"}.get(hint, getattr(hint, "__name__", str(hint)))


def _require(holds: bool, key: str, value, what: str) -> None:
    if not holds:
        raise UserError(f"config.{key} = {value!r}: {what}")


def _choice(key: str, value, choices: tuple) -> None:
    near = difflib.get_close_matches(str(value), choices, n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(choices)}"
    _require(value in choices, key, value, advice)


def _at_least(config: Config, least: float, *keys: str) -> None:
    for key in keys:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        _require(value >= least, key, value, f"must be at least {least}")


def _check_student(config: Config) -> None:
    student = config.student
    _require(student.model != "", "student.model", "", "name a Hugging Face model directory")
    if student.dtype is not None:
        _choice("student.dtype", student.dtype, ("float32", "bfloat16", "float16"))
    _choice("student.compute_dtype", student.compute_dtype, ("float32", "bfloat16"))
    _choice("student.adapter", student.adapter, ("lora", "none"))
    lora = student.lora
    _require(lora.rank >= 1, "student.lora.rank", lora.rank, "must be at least 1")
    _require(lora.alpha > 0, "student.lora.alpha", lora.alpha, "must be positive")
    _require(0 <= lora.dropout < 1, "student.lora.dropout", lora.dropout, "must be in [0, 1)")
    if isinstance(lora.targets, str):
        _choice("student.lora.targets", lora.targets, ("all-linear",))
    _require(len(lora.targets) > 0, "student.lora.targets", lora.targets, "names no kernel")


def _check_teacher(config: Config) -> None:
    teacher = config.teacher
    _require(
        teacher.backend != "hf",
        "teacher.backend",
        "hf",
        "another checkpoint in this process is called 'flax' here",
    )
    _choice("teacher.backend", teacher.backend, ("local-toggle", "flax"))
    if teacher.backend == "flax":
        _require(teacher.model != "", "teacher.model", "", "the flax teacher needs a directory")
    else:
        advice = "local-toggle has no model of its own; set teacher.backend='flax'"
        _require(teacher.model == "", "teacher.model", teacher.model, advice)
    if teacher.dtype is not None:
        _choice("teacher.dtype", teacher.dtype, ("float32", "bfloat16", "float16"))
    if teacher.top_k is not None:
        _require(teacher.top_k >= 1, "teacher.top_k", teacher.top_k, "must be at least 1, or None")


def _check_gkd(config: Config) -> None:
    gkd = config.gkd
    _choice("gkd.divergence", gkd.divergence, DIVERGENCES)
    _choice("gkd.warmup_divergence", gkd.warmup_divergence, DIVERGENCES)
    _choice("gkd.tail", gkd.tail, ("bucket", "renormalize"))
    beta = gkd.jsd_beta
    _require(0 <= beta <= 1, "gkd.jsd_beta", beta, "must be in [0, 1]")
    used = (gkd.divergence, gkd.warmup_divergence, config.anchor.divergence)
    if "generalized_jsd" in used:
        advice = "generalized_jsd needs 0 < beta < 1; at its ends use forward_kl or reverse_kl"
        _require(0 < beta < 1, "gkd.jsd_beta", beta, advice)
    fraction = gkd.on_policy_fraction
    _require(0 <= fraction <= 1, "gkd.on_policy_fraction", fraction, "must be in [0, 1]")
    _require(gkd.temperature > 0, "gkd.temperature", gkd.temperature, "must be positive")
    _at_least(config, 0, "gkd.on_policy_warmup_steps")
    anchor = config.anchor
    _choice("anchor.towards", anchor.towards, ("base", "teacher"))
    _choice("anchor.divergence", anchor.divergence, DIVERGENCES)
    _choice("anchor.tokens", anchor.tokens, ("response", "all"))
    _require(anchor.weight > 0, "anchor.weight", anchor.weight, "must be positive")
    _at_least(config, 1, "anchor.batch_size")


def _check_text(config: Config) -> None:
    for message in config.context.prefix_messages:
        fits = set(message) == {"role", "content"} and all(
            isinstance(value, str) for value in message.values()
        )
        advice = "each message is {'role': str, 'content': str}"
        _require(fits, "context.prefix_messages", message, advice)
    _require(
        len(config.context.target_roles) > 0, "context.target_roles", (), "names no role to train"
    )
    _at_least(config, 0, "context.student_retained_turns", "trajectory.temperature")
    _at_least(config, 1, "trajectory.per_prompt", "trajectory.max_new_tokens")
    _at_least(config, 1, "eval.max_new_tokens", "eval.batch_size")
    top_p = config.trajectory.top_p
    _require(0 < top_p <= 1, "trajectory.top_p", top_p, "must be in (0, 1]")
    _require(config.data.train != "", "data.train", "", "name a .json or .jsonl file, or give rows")
    _choice("data.too_long", config.data.too_long, ("drop", "truncate"))
    _at_least(config, 2, "data.max_length")
    for length in config.data.bucket_lengths:
        _require(length >= 1, "data.bucket_lengths", length, "must be at least 1")


def _check_training(config: Config) -> None:
    optim, train = config.optim, config.train
    _require(optim.learning_rate > 0, "optim.learning_rate", optim.learning_rate, "must be > 0")
    _choice("optim.schedule", optim.schedule, ("cosine", "linear", "constant"))
    _require(0 <= optim.warmup_ratio < 1, "optim.warmup_ratio", optim.warmup_ratio, "is in [0, 1)")
    _require(optim.max_grad_norm > 0, "optim.max_grad_norm", optim.max_grad_norm, "must be > 0")
    _at_least(config, 0, "optim.weight_decay", "train.seed")
    _at_least(config, 1, "train.batch_size", "train.accumulation")
    _at_least(config, 1, "checkpoint.every_steps", "checkpoint.keep")
    one_given = (train.epochs is None) != (train.steps is None)
    _require(one_given, "train.steps", train.steps, "give train.epochs or train.steps, one as None")
    length = train.epochs if train.steps is None else train.steps
    _require(length > 0, "train.epochs or train.steps", length, "must be positive")
    for key, rows in (("train", train.batch_size), ("anchor", config.anchor.batch_size)):
        advice = f"must be a multiple of train.accumulation = {train.accumulation}"
        _require(rows % train.accumulation == 0, f"{key}.batch_size", rows, advice)
    _choice("train.export", train.export, ("merged", "adapter", "both"))
    if config.student.adapter == "none":
        advice = "without an adapter (student.adapter='none') only 'merged' can be exported"
        _require(train.export == "merged", "train.export", train.export, advice)
