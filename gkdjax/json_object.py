"""Small JSON files that others write beside a model or an adapter: one object each."""

import json
import pathlib

from gkdjax.errors import UserError


def read(path: pathlib.Path) -> dict:
    """The object that the file holds.

    Raises:
      UserError: it does not parse, or holds something else; the file is named.
    """
    try:
        parsed = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} does not parse: {error}") from None
    except RecursionError:
        raise UserError(f"{path} does not parse: it nests too deeply") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path} must hold a JSON object")
    return parsed
