"""Directories that appear whole or not at all, and the tensors in them."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from gkdjax.models.hf.tensor_files import DTYPES
from gkdjax.parallel import multihost
from gkdjax.utils.errors import UserError

_KINDS = {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """A tensor of a file to come."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@contextlib.contextmanager
def whole_directory(directory: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty directory to write into, which takes the place of `directory` at the end.

    It is a hidden .DIR.gkdjax-part until all of it is on the disk. A directory that is there is
    .DIR.gkdjax-old for the moment between the two renames, since no file system renames over a full
    one; a process that is killed just then leaves both, whole. After an error the old one stays.

    Raises:
      UserError: it cannot be made or written.
    """
    final = pathlib.Path(directory).resolve()  # a link stays one
    # Names that nobody else gives: what a killed process left under them may be removed.
    part, old = (final.with_name(f".{final.name}.gkdjax-{end}") for end in ("part", "old"))
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be made: {error}") from None
    try:
        yield part
        for file in (*part.rglob("*"), part):
            _to_disk(file)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{directory} cannot be written: {error}") from error
        raise
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    part.rename(final)
    _to_disk(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def save_tensors(tensors: dict[str, Tensor], path: pathlib.Path) -> None:
    """Writes a safetensors file; one tensor after the other is made and written.

    The safetensors library would want all of them at once. Of several processes the leader writes;
    the others make the tensors with it, as each may have a part of them.
    """
    # The largest numbers first, so that each tensor is aligned to its own.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        dtype, shape, _ = tensors[name]
        stop = start + tensors[name].nbytes
        kind = _KINDS[dtype]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            array = tensors[name].make()
            if (array.dtype, array.shape) != tensors[name][:2]:
                raise ValueError(f"{name} was made as {array.dtype} {array.shape}")
            if multihost.leads():
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _to_disk(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
