"""What the checks of a config are made of: each raises UserError, with the key and the value."""

import difflib
import re

from gkdjax.errors import UserError


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
