"""A parser for standard JSON, which refuses what Python's own accepts beyond that."""

import json
import math
from collections.abc import Callable

from gkdjax.utils.errors import WrongAnswer


class NotJson(ValueError):
    """It is cut short, or something else, such as a proxy's error page."""


def parse(body: bytes, wrong: Callable[[str], WrongAnswer]) -> dict | list:
    """The object or list in `body`, which is UTF-8.

    Raises:
      NotJson: it does not parse.
      WrongAnswer: a number is not finite, an object has a key twice (Python silently takes the
        last one), it is nested too deeply, or neither object nor list. `wrong` makes the error
        from a description such as "has the number NaN".
    """

    def refuse_constant(name: str) -> float:
        raise wrong(f"has the number {name}, which is no JSON")

    def finite(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise wrong(f"has a number beyond all floats, {digits[:40]}")
        return number

    def distinct(pairs: list[tuple]) -> dict:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise wrong(f"has an object with the key {twice[:80]!r} twice")
        return result

    hooks = {
        "parse_constant": refuse_constant,
        "parse_float": finite,
        "object_pairs_hook": distinct,
    }
    try:
        parsed = json.loads(body.decode(), **hooks)
    except RecursionError:
        raise wrong("is nested too deeply") from None
    except ValueError as error:
        raise NotJson(str(error)) from None
    if not isinstance(parsed, dict | list):
        raise wrong(f"is a single {type(parsed).__name__}, not an object")
    return parsed
