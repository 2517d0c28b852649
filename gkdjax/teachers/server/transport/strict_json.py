"""JSON as its standard has it: what Python's parser lets pass beyond that is refused."""

import json
import math
from collections.abc import Callable

from gkdjax.utils.errors import WrongAnswer


class NotJson(ValueError):
    """Cut short, or something else, as a proxy's error page."""


def parse(body: bytes, wrong: Callable[[str], WrongAnswer]) -> dict | list:
    """The object or list that `body` holds.

    Args:
      body: UTF-8.
      wrong: makes the error from what is wrong, as "has the number NaN"; it may quote `body`.

    Raises:
      NotJson: it does not parse.
      WrongAnswer: it parses, but a number is not finite, an object has a key twice (Python keeps
        the last in silence), or it is neither object nor list, or nested too deeply.
    """

    def no_constant(name: str) -> float:
        raise wrong(f"has the number {name}, which is no JSON")

    def finite(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise wrong(f"has a number beyond all floats, {digits[:40]}")
        return number

    def distinct(pairs: list[tuple]) -> dict:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice = next(key for key in made if sum(key == other for other, _ in pairs) > 1)
            raise wrong(f"has an object with the key {twice[:80]!r} twice")
        return made

    try:
        parsed = json.loads(
            body.decode(),
            parse_constant=no_constant,
            parse_float=finite,
            object_pairs_hook=distinct,
        )
    except RecursionError:
        raise wrong("is nested too deeply") from None
    except ValueError as error:
        raise NotJson(str(error)) from None
    if not isinstance(parsed, dict | list):
        raise wrong(f"is a single {type(parsed).__name__}, not an object")
    return parsed
