"""Directories that appear whole or not at all, and the tensors in them."""

import contextlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from gkdjax.models.hf.tensor_files import DTYPES
from gkdjax.parallel import multihost
from gkdjax.utils.files import to_disk, writing

_KINDS = {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """A tensor that `make` computes when it is written."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@contextlib.contextmanager
def whole_directory(directory: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives an empty directory to write into, which replaces `directory` at the end.

    It is a hidden .DIR.gkdjax-part until all of it is on the disk. An older directory is
    .DIR.gkdjax-old between the two renames, since no file system renames over a full one; a process
    that is killed there leaves both, whole. After an error the older one stays.

    Raises:
      NotWritten: it cannot be made or written.
    """
    final = pathlib.Path(directory).resolve()  # a link stays one
    # Only a killed process of ours leaves such names: they may be removed.
    part, old = (final.with_name(f".{final.name}.gkdjax-{end}") for end in ("part", "old"))
    with writing(directory):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            yield part
            for file in (*part.rglob("*"), part):
                to_disk(file)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        part.rename(final)
        to_disk(final.parent)
        shutil.rmtree(old, ignore_errors=True)


def save_tensors(tensors: dict[str, Tensor], path: pathlib.Path) -> None:
    """Writes a safetensors file, one tensor at a time; the library wants all of them at once.

    All processes make the tensors, because each may hold a part of them; the leader writes.
    """
    # The largest numbers first, so that each tensor is aligned to its own.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        tensor, stop = tensors[name], start + tensors[name].nbytes
        header[name] = {
            "dtype": _KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = tensors[name].make()
            if (array.dtype, array.shape) != tensors[name][:2]:
                raise ValueError(f"{name} was made as {array.dtype} {array.shape}")
            if multihost.leads():
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
