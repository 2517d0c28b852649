"""From nested dicts to the config's dataclasses: every key is known, every value of its type."""

import copy
import dataclasses
import difflib
import json
import math
import types
import typing
from typing import Annotated, Literal

from ml_collections import config_dict

from gkdjax.config import checks
from gkdjax.config.schema import Config
from gkdjax.utils.errors import UserError

_MOST = 60  # characters of a value in a message
# Keys and sections of earlier releases -> their names now.
RENAMED = {
    "trajectory": "rollout",
    "rollout.max_refills": "rollout.max_retries",
    "train.accumulation": "train.grad_accum_steps",
    "anchor.towards": "anchor.reference",
    "student.lora.start_from": "student.lora.init_from",
    "checkpoint.keep": "checkpoint.max_to_keep",
}


def default() -> config_dict.ConfigDict:
    """Every key with its default, as a ConfigDict that refuses unknown keys."""
    return _to_config_dict(Config())


def parse(raw: config_dict.ConfigDict | dict) -> Config:
    """Turns a ConfigDict into dataclasses, with every check that needs no file.

    Raises:
      UserError: naming the key, the value, and what would be right.
    """
    raw = raw.to_dict() if isinstance(raw, config_dict.ConfigDict) else raw
    config = _section(Config, raw, "")
    if config.teacher.is_server and config.teacher.top_k is None:
        config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, top_k=20))
    checks.check(config)
    return config


def to_dict(config: Config) -> dict:
    """-> plain dicts, lists and scalars, as JSON has them: the content of RUN/config.json."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_saved(raw: dict) -> dict:
    """The content of a run's config.json with today's keys; what it lacks is the default's.

    A key that is newer than the run had no effect on it.
    """
    raw = copy.deepcopy(raw)
    for old, new in RENAMED.items():
        *sections, name = old.split(".")
        section = raw
        for one in sections:
            section = section.get(one) if isinstance(section, dict) else None
        if isinstance(section, dict) and name in section:
            section[new.rpartition(".")[2]] = section.pop(name)
    return _over(to_dict(Config()), raw)


def check_key(path: str) -> None:
    """Raises UserError, with the nearest key, if a path like "train.sede" is no key."""
    hint, walked = Config, ""
    for name in path.split("."):
        if not dataclasses.is_dataclass(hint):
            raise UserError(
                f"config.{walked} is one value: give all of it, as --config.{walked}=..."
            )
        hint = _hints(hint, [name], walked)[name]
        walked = f"{walked}.{name}".lstrip(".")


def readable(hint) -> str:
    """A type in words, as "int at least 1 or None"."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(map(readable, arguments))
    if kind is Annotated:
        return f"{readable(arguments[0])} {arguments[1]}"
    if kind is Literal:
        return " or ".join(map(repr, arguments))
    if kind in (tuple, dict):
        return f"a {'list' if kind is tuple else 'dict'} of {readable(arguments[-(kind is dict)])}"
    if typing.is_typeddict(hint):
        return f"a dict of {', '.join(typing.get_type_hints(hint))}"
    return "None" if hint is types.NoneType else hint.__name__


def _hints(cls, names, prefix: str) -> dict:
    """Field -> type of a section; raises UserError for a name that is no field of it."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for name in names:
        if name in hints:
            continue
        key = f"{prefix}.{name}".lstrip(".")
        if key in RENAMED:
            raise UserError(f"config.{key} is now called config.{RENAMED[key]}")
        near = difflib.get_close_matches(name, hints, n=1, cutoff=0.5)
        near = [f"did you mean config.{f'{prefix}.{name}'.lstrip('.')}?" for name in near]
        raise UserError(f"unknown key config.{key}: {[*near, f'there are {sorted(hints)}'][0]}")
    return hints


def _section(cls, raw: dict, prefix: str):
    hints = _hints(cls, raw, prefix)
    values = {}
    for name, hint in hints.items():
        key = f"{prefix}.{name}".lstrip(".")
        if name not in raw:
            raise UserError(f"config.{key} is missing: start from config.default()")
        values[name] = _value(hint, raw[name], key)
    return cls(**values)


def _value(hint, value, key: str):
    """`value` as the hinted type; lists become tuples, and an int may stand for a float.

    Raises:
      UserError: it is of another type, or not one of the values that the type takes.
    """
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"config.{key} is a section, not {_shown(value)}")
        return _section(hint, value, key)
    if kind in (typing.Union, types.UnionType):
        return _one_of(hint, arguments, value, key)
    if kind is Annotated:
        value = _value(arguments[0], value, key)
        if value not in arguments[1]:
            raise UserError(f"config.{key} = {value!r}: must be {arguments[1]}")
        return value
    if kind is Literal:
        checks.choice(key, value, arguments)
        return value
    if hint in (int, float) and type(value) in (int, hint):
        _require_json(value, key)
        limit = 2.0**53 if hint is int else 3e38  # whole in a float64; finite in a float32
        if value and not 1e-37 < abs(value) < limit:
            advice = f"a number other than 0 has to lie between 1e-37 and {limit:.0e}"
            raise UserError(f"config.{key} = {_shown(value)}: {advice}")
        return hint(value)
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(_value(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if kind is dict and isinstance(value, dict):
        return {str(n): _value(arguments[1], one, f"{key}.{n}") for n, one in value.items()}
    if typing.is_typeddict(hint) and isinstance(value, dict):
        fields = typing.get_type_hints(hint, include_extras=True)
        if set(value) == set(fields):
            return {n: _value(fields[n], one, f"{key}.{n}") for n, one in value.items()}
    elif type(value) is hint:
        _require_json(value, key)
        return value
    raise UserError(f"config.{key} must be {readable(hint)}, not {_shown(value)}")


def _one_of(hint, options, value, key: str):
    containers = {Literal: str, tuple: list | tuple, dict: dict}
    kinds = [(option, typing.get_origin(option) or option) for option in options]
    same = [o for o, kind in kinds if kind in containers and isinstance(value, containers[kind])]
    if len(same) == 1:  # then what is wrong is one thing in it
        return _value(same[0], value, key)
    for option in options:
        try:
            return _value(option, value, key)
        except UserError:
            continue
    raise UserError(f"config.{key} must be {readable(hint)}, not {_shown(value)}")


def _require_json(value, key: str) -> None:
    """Raises UserError for what RUN/config.json, which has all of the config, cannot hold."""
    if isinstance(value, dict):
        for name, one in value.items():
            _require_json(one, f"{key}[{name!r}]")
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            _require_json(one, f"{key}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"config.{key} is {value}, which is not JSON; write a finite number or None"
        )
    elif not isinstance(value, str | int | float | types.NoneType):
        raise UserError(
            f"config.{key} is of the type {type(value).__name__}, which is not JSON; write text,"
            " numbers, lists and dicts of Python (.tolist() of an array)"
        )


def _shown(value) -> str:
    """The value, cut, and its type where that may not be seen."""
    text = repr(value)
    return text if len(text) <= _MOST else f"{text[:_MOST]}... ({type(value).__name__})"


def _over(defaults: dict, saved: dict) -> dict:
    sections = {
        name: _over(value, saved[name])
        for name, value in defaults.items()
        if isinstance(value, dict) and isinstance(saved.get(name), dict)
    }
    return defaults | saved | sections


def _to_config_dict(section) -> config_dict.ConfigDict:
    """Scalars keep their type in the ConfigDict; what may hold several types is left open there."""
    result = config_dict.ConfigDict()
    for name, hint in typing.get_type_hints(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            result[name] = _to_config_dict(value)
        elif typing.get_origin(hint) is Literal or hint in (str, int, float, bool):
            result[name] = value
        else:
            result[name] = config_dict.FieldReference(value, field_type=object)
    return result.lock()
