"""Files that appear whole or not at all, and JSON in them."""

import contextlib
import json
import pathlib
from collections.abc import Iterable, Iterator

from gkdjax.utils.errors import UserError


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the path of a new file, which takes the place of `path` if the block ends well."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a whole file, or none."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: pathlib.Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: pathlib.Path, lines: Iterable[dict]) -> None:
    """Writes a JSON object on each line."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def drop_lines_from(path: pathlib.Path, step: int) -> None:
    """Keeps whole lines of steps before `step`; a line that a crash cut off is not whole."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] >= step:
            break
        kept.append(line)
    write_text(path, "".join(kept))


def read_lines(path: pathlib.Path) -> list[dict]:
    """Parses all lines in order; [] without a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_json(path: pathlib.Path) -> dict | None:
    """Parses a JSON object; None without a file. Errors are those of `read_object`."""
    return read_object(path) if path.exists() else None


def read_object(path: pathlib.Path) -> dict:
    """Parses a JSON object.

    Raises:
      UserError: the file cannot be read, does not parse, or holds something else; it is named.
    """
    try:
        parsed = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # Python's own advice for long numbers is a call in a program
        reason, *_ = str(error).split("; use sys.set_int_max_str_digits")
        raise UserError(f"{path} does not parse: {reason}") from None
    except RecursionError:
        raise UserError(f"{path} does not parse: it nests too deeply") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path} must hold a JSON object")
    return parsed
