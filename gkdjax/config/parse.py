"""From nested dicts to the config's dataclasses: every key is known, every value of its type."""

import copy
import dataclasses
import difflib
import json
import math
import types
import typing

from ml_collections import config_dict

from gkdjax.config import checks
from gkdjax.config.schema import Config
from gkdjax.utils.errors import UserError

_MOST = 60  # characters of a value in a message
# Keys and sections of earlier releases -> what they are called now.
RENAMED = {
    "trajectory": "rollout",
    "rollout.max_refills": "rollout.max_retries",
    "train.accumulation": "train.grad_accum_steps",
    "anchor.towards": "anchor.reference",
    "student.lora.start_from": "student.lora.init_from",
    "checkpoint.keep": "checkpoint.max_to_keep",
}


def check_path(cls, path: str) -> None:
    """Raises UserError, with the nearest key, if a path like "train.sede" is no key of `cls`."""
    hints = typing.get_type_hints(cls)
    walked = ""
    for name in path.split("."):
        if walked and not hints:
            key = walked.rstrip(".")
            raise UserError(f"config.{key} is one value: give all of it, as --config.{key}=...")
        if name not in hints:
            _unknown(walked + name, hints, walked)
        walked += name + "."
        hint = hints[name]
        hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}


def build(cls, raw: dict, prefix: str):
    """The config class `cls` from nested dicts; `prefix` is the path of keys so far, for errors.

    Raises:
      UserError: an unknown or missing key, or a value of another type than the field's.
    """
    hints = typing.get_type_hints(cls)
    for name in raw:
        if name not in hints:
            _unknown(prefix + name, hints, prefix)
    for name in hints:
        if name not in raw:
            raise UserError(f"config.{prefix}{name} is missing: start from config.default()")
    return cls(**{name: _value(hint, raw[name], prefix + name) for name, hint in hints.items()})


def _unknown(key: str, hints: dict, prefix: str):
    if key in RENAMED:
        raise UserError(f"config.{key} is now called config.{RENAMED[key]}")
    near = difflib.get_close_matches(key.removeprefix(prefix), hints, n=1, cutoff=0.5)
    advice = f"did you mean config.{prefix}{near[0]}?" if near else f"there are {sorted(hints)}"
    raise UserError(f"unknown key config.{key}: {advice}")


def _value(hint, value, key: str):
    """`value` as the hinted type; lists become tuples, and an int may stand for a float."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"config.{key} is a section, not {_shown(value)}")
        return build(hint, value, key + ".")
    if isinstance(hint, types.UnionType):
        holds = [option for option in typing.get_args(hint) if _holds(option, value)]
        if len(holds) == 1:  # then what is wrong is one thing in it
            return _value(holds[0], value, key)
        for option in typing.get_args(hint):
            try:
                return _value(option, value, key)
            except UserError:
                continue
        raise UserError(f"config.{key} must be {_readable(hint)}, not {_shown(value)}")
    if hint is float and type(value) is int:
        return float(value)
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        of = typing.get_args(hint)[0]
        return tuple(_value(of, item, f"{key}[{i}]") for i, item in enumerate(value))
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        return {str(name): _value(typing.get_args(hint)[1], v, key) for name, v in value.items()}
    if type(value) is not (typing.get_origin(hint) or hint):
        raise UserError(f"config.{key} must be {_readable(hint)}, not {_shown(value)}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"config.{key} must be a finite number, not {value!r}")
    if hint is dict:
        _require_json(value, key)
    return value


def _holds(hint, value) -> bool:
    """Whether `hint` is a list of something and `value` is a list; so for dicts."""
    kinds = {tuple: list | tuple, dict: dict}
    kind = kinds.get(typing.get_origin(hint) or hint)
    return kind is not None and isinstance(value, kind)


def _require_json(value, key: str) -> None:
    """Raises UserError for what a row or the like cannot hold: RUN/config.json has all of it."""
    if isinstance(value, dict):
        for name, one in value.items():
            _require_json(one, f"{key}[{name!r}]")
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            _require_json(one, f"{key}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config.{key} is {value}, which is not JSON; write a number or None")
    elif not isinstance(value, str | int | float | types.NoneType):
        raise UserError(
            f"config.{key} is of the type {type(value).__name__}, which is not JSON; write text,"
            " numbers, lists and dicts of Python (.tolist() of an array)"
        )


def _shown(value) -> str:
    """A value, cut, and its type where that may not be seen."""
    text = repr(value)
    return text if len(text) <= _MOST else f"{text[:_MOST]}... ({type(value).__name__})"


def _readable(hint) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_readable(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_readable(typing.get_args(hint)[0])}"
    if hint is types.NoneType:
        return "None"
    return {dict: "dict"}.get(hint, getattr(hint, "__name__", str(hint)))


def default() -> config_dict.ConfigDict:
    """Every key with its default, as a ConfigDict that refuses unknown keys."""
    return _to_config_dict(Config())


def from_saved(raw: dict) -> dict:
    """The content of a run's config.json with today's keys; what it lacks is the default's.

    A key that is newer than the run had no effect on it.
    """
    raw = copy.deepcopy(raw)
    for old, new in RENAMED.items():
        *sections, name = old.split(".")
        *_, new_name = new.split(".")
        section = raw
        for one in sections:
            section = section.get(one) if isinstance(section, dict) else None
        if isinstance(section, dict) and name in section:
            section[new_name] = section.pop(name)
    return _over(json.loads(json.dumps(to_dict(Config()))), raw)


def _over(defaults: dict, saved: dict) -> dict:
    sections = {
        name: _over(value, saved[name])
        for name, value in defaults.items()
        if isinstance(value, dict) and isinstance(saved.get(name), dict)
    }
    return defaults | saved | sections


def to_dict(config: Config) -> dict:
    """Plain dicts, lists and scalars, as written to a run's config.json."""
    return dataclasses.asdict(config)


def parse(raw: config_dict.ConfigDict | dict) -> Config:
    """Turns a ConfigDict into dataclasses, with every check that needs no file.

    Raises:
      UserError: naming the key, the value, and what would be right.
    """
    raw = raw.to_dict() if isinstance(raw, config_dict.ConfigDict) else raw
    config = build(Config, raw, "")
    if config.teacher.is_server and config.teacher.top_k is None:
        config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, top_k=20))
    checks.check(config)
    return config


def check_key(path: str) -> None:
    """Raises UserError, with the nearest key, if "train.sede" is no key of the config."""
    check_path(Config, path)


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
