"""Files that appear whole or not at all, and JSON in them; disks that take no more."""

import contextlib
import errno
import io
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator

from absl import logging

from gkdjax.utils.errors import NotWritten, UserError, one_line
from gkdjax.utils.text import size


def free_bytes(path: pathlib.Path) -> int:
    """Returns what is free on the file system where `path` is, or would be."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


_FULL = errno.ENOSPC, errno.EDQUOT
_ADVICE = {
    **dict.fromkeys(_FULL, "make room"),
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or that of the disk",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give this user the right to write there"),
    errno.EROFS: "mount it for writing, or name another place",
    errno.EIO: "check the disk",
}


def not_written(path: pathlib.Path, why: Exception) -> NotWritten:
    """Makes the error of a file, or a directory, that could not be written, with what helps."""
    code, reason = getattr(why, "errno", None), getattr(why, "strerror", None) or one_line(why)
    named = getattr(why, "filename", None)  # of a whole directory, or of its source
    if named and code not in _FULL and os.fspath(named) != os.fspath(path):
        reason += f" ({named})"
    if code in _FULL:
        reason += f", {size(free_bytes(path))} are free there"
    if code in _ADVICE:
        reason += f": {_ADVICE[code]}"
    return NotWritten(f"{path} cannot be written: {reason}")


def require_room(path: pathlib.Path, what: str, least: int, wanted: int) -> None:
    """Warns if fewer than `wanted` bytes are free at `path`, for `what` and what follows it.

    Raises:
      NotWritten: fewer than `least` are, so not even `what` can be written.
    """
    free = free_bytes(path)
    if free < least:
        needed = f"{what} takes {size(least)}, and {size(free)} are free there: make room"
        raise NotWritten(f"{path} cannot be written: {needed}")
    if free < wanted:
        logging.warning(
            "%s may get full: the run is going to write %s, of which %s takes %s, and %s are free"
            " there",
            *(path, size(wanted), what, size(least), size(free)),
        )


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Has the operating system's errors in the block name the file that it writes.

    Raises:
      NotWritten: for an OSError.
    """
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error


class _Dropping(io.FileIO):
    """A stream that drops what is not taken: by a full disk, or by a program that has ended."""

    _told = False

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() == 1 and not self._told:
                self._told = True
                lost = f"gkdjax: what is printed on stdout is lost: {error.strerror}"
                print(lost, file=sys.stderr)
            return len(data)


def print_or_drop() -> None:
    """Has nothing end because stdout or stderr cannot be written."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):  # closed, or captured
            continue
        stream.flush()
        raw = _Dropping(stream.fileno(), "w", closefd=False)
        how = {"encoding": stream.encoding, "errors": stream.errors}
        how |= {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **how))


def to_disk(path: pathlib.Path) -> None:
    """Returns when a power cut would leave the file, or the names in the directory, as they are."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems do not offer it for directories
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the path of a new file, which takes the place of `path` if the block ends well.

    It is on the disk then. Raises NotWritten.
    """
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            yield part
            to_disk(part)
            part.replace(path)
            to_disk(path.parent)
        finally:
            part.unlink(missing_ok=True)


def append(path: pathlib.Path, text: str) -> None:
    """Adds text at the end of a file, or nothing; it may not be on the disk yet.

    Raises NotWritten.
    """
    with writing(path), path.open("a+b", buffering=0) as file:
        end, left = file.seek(0, os.SEEK_END), text.encode()
        if end:
            file.seek(end - 1)
            left = left if file.read(1) == b"\n" else b"\n" + left  # a crash cut a line off
        try:
            while left:  # a disk that gets full takes a part
                left = left[file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def append_line(path: pathlib.Path, line: dict) -> None:
    append(path, json.dumps(line) + "\n")


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a whole file, or none."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: pathlib.Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: pathlib.Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: pathlib.Path, lines: Iterable[dict]) -> None:
    """Writes a JSON object on each line."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: pathlib.Path) -> list[dict]:
    """Parses all lines in order; [] without a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_json(path: pathlib.Path) -> dict | None:
    """Parses a JSON object; None without a file. Errors are those of `read_object`."""
    return read_object(path) if path.exists() else None


def is_count(value) -> bool:
    """Whether a value of a JSON file is a whole number above 0 of at most 31 bits, as sizes are."""
    return type(value) is int and 0 < value < 2**31


def is_number(value) -> bool:
    """Whether it is a number that float32 computes with: NaN and 1e39 are none, true is none."""
    return type(value) in (int, float) and (value == 0 or 1e-12 <= abs(value) <= 1e12)


def read_object(path: pathlib.Path) -> dict:
    """Parses a JSON object.

    Raises:
      UserError: the file cannot be read, does not parse, or holds something else; it is named.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
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
