"""Small JSON files that others write beside a model or an adapter: one object each."""

import json
import pathlib
from collections.abc import Sequence

from gkdjax.utils.errors import UserError


def read_object(path: pathlib.Path) -> dict:
    """The object that the file holds.

    Raises:
      UserError: it cannot be read, does not parse, or holds something else; the file is named.
    """
    try:
        parsed = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # Python's own remedy for long numbers is a call in a program
        reason, *_ = str(error).split("; use sys.set_int_max_str_digits")
        raise UserError(f"{path} does not parse: {reason}") from None
    except RecursionError:
        raise UserError(f"{path} does not parse: it nests too deeply") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path} must hold a JSON object")
    return parsed


def read_lines(path: pathlib.Path) -> list[dict]:
    """All lines of such a file, in order; [] if there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_lines(path: pathlib.Path, lines: Sequence[dict]) -> None:
    """A whole file of such lines, or none."""
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part.replace(path)
