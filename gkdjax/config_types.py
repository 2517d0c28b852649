"""From nested dicts to the config's dataclasses: every key is known, every value of its type."""

import dataclasses
import difflib
import math
import types
import typing

from gkdjax.errors import UserError


def check_key(cls, path: str) -> None:
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
    near = difflib.get_close_matches(key.removeprefix(prefix), hints, n=1, cutoff=0.5)
    advice = f"did you mean config.{prefix}{near[0]}?" if near else f"there are {sorted(hints)}"
    raise UserError(f"unknown key config.{key}: {advice}")


def _value(hint, value, key: str):
    """`value` as the hinted type; lists become tuples, and an int may stand for a float."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"config.{key} is a section, not {value!r}")
        return build(hint, value, key + ".")
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
