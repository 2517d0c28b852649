"""The safetensors of one model directory, by tensor name; a tensor is read when it is asked for."""

import pathlib
import re

import ml_dtypes
import numpy as np
import safetensors

from gkdjax.utils import files
from gkdjax.utils.errors import UserError, one_line

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")  # reading one runs whatever code it holds

# The names of transformers for `variant="fp16"`: the same weights in another dtype.
_VARIANT = re.compile(r"model(-\d+-of-\d+)?\.[^.]+(-\d+-of-\d+)?\.safetensors")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_ADAPTERS = ("adapter_model.safetensors", "adapters.safetensors")  # PEFT's name, and MLX's

# The format's names of dtypes, as numpy or ml_dtypes has them.
DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "BOOL": np.bool_,
    "C64": np.complex64,
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}


class TensorFiles:
    """The tensors of a model directory; shapes and dtypes come from the files' headers.

    The files are those that model.safetensors.index.json names; without it model.safetensors, else
    its shards, else all *.safetensors but an adapter's. Other copies of the weights, as
    consolidated.safetensors, are ignored, as by transformers. The files stay mapped into memory.

    Attributes:
      directory: of the model.
      names: of all tensors, sorted.
      absent: tensor name -> file, of those that the index names and the file lacks.
    """

    def __init__(self, directory: str | pathlib.Path):
        """Opens the files and reads their headers.

        Raises:
          UserError: no safetensors; a file that is missing, damaged, not in the index or outside
            the directory; a tensor in two files, or in another one than the index says.
        """
        self.directory = pathlib.Path(directory)
        index = _weight_map(self.directory)
        paths = _plain_files(self.directory) if index is None else _indexed(self.directory, index)
        self._handles = {path: open_safetensors(path) for path in paths}
        self._path_of: dict[str, pathlib.Path] = {}
        for path, handle in self._handles.items():
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                if name in self._path_of:
                    raise UserError(
                        f"{self.directory}: tensor {name!r} stands in {self._path_of[name].name}"
                        f" and in {path.name}; remove the file that does not belong here"
                    )
                self._path_of[name] = path
                if index is not None and index.get(name) != path.name:
                    entry = f"puts it into {index[name]}" if name in index else "does not name it"
                    raise UserError(
                        f"{self.directory}: tensor {name!r} stands in {path.name}; {INDEX} {entry}"
                    )
        self.absent = {n: f for n, f in (index or {}).items() if n not in self._path_of}
        self.names = tuple(sorted(self._path_of))

    def __contains__(self, name: str) -> bool:
        return name in self._path_of

    def file(self, name: str) -> pathlib.Path:
        return self._path_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """The dtype, of numpy or ml_dtypes; UserError where neither has it."""
        kind = self._slice(name).get_dtype()
        if kind not in DTYPES:
            raise UserError(
                f"{self.file(name)}: tensor {name!r} has dtype {kind}, which cannot be read"
            )
        return np.dtype(DTYPES[kind])

    def read(self, name: str, index: tuple[slice, ...] | slice | None = None) -> np.ndarray:
        """Copies tensor `name`, or the part of it that `index` selects (steps of 1)."""
        if index is None:
            return self._handles[self.file(name)].get_tensor(name)
        return self._slice(name)[index]

    def _slice(self, name: str):
        return self._handles[self.file(name)].get_slice(name)


def open_safetensors(path: pathlib.Path):
    """Opens a file and reads its header; UserError where it is damaged."""
    try:
        return safetensors.safe_open(path, framework="numpy")
    except Exception as error:  # safetensors raises its own type for each kind of damage
        raise UserError(
            f"{path} is not a readable safetensors file ({one_line(error)}); get it once more"
        ) from error


def pickle_refusal(where: str, files: list[str]) -> str:
    return (
        f"{where} holds its weights as pickle files ({', '.join(files[:3])}), which can run code"
        " and are not read; convert them to safetensors: load the model with transformers where"
        " you trust it, and save_pretrained it"
    )


def refuse_not_finite(path: pathlib.Path, name: str, part: np.ndarray) -> None:
    """Raises UserError for a NaN or an infinity among float32, bfloat16 or float16 numbers.

    Looks at the bits of the exponents: `np.isfinite` doubles the time that loading bfloat16 takes.
    """
    bits, infinity = (x.view(f"u{x.itemsize}") << 1 for x in (part, np.array(np.inf, part.dtype)))
    if bits.size and bits.max() >= infinity:
        raise UserError(
            f"{path}: tensor {name!r} holds NaN or infinity, so the file is damaged or the training"
            " that wrote it had failed; get it once more, or take an earlier checkpoint"
        )


def _weight_map(directory: pathlib.Path) -> dict[str, str] | None:
    """Tensor name -> file name, as the index has it; None without an index."""
    path = directory / INDEX
    if not path.is_file():
        return None
    weight_map = files.read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} holds no weight_map from tensor names to file names")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and not set(file) & {"/", "\\", "\0"}
        if not plain or not file.endswith(".safetensors"):
            raise UserError(
                f"{path}: weight_map puts {name!r} into {file!r}, which is not the plain name of a"
                " *.safetensors file in this directory; nothing else is read"
            )
    return weight_map


def _indexed(directory: pathlib.Path, weight_map: dict[str, str]) -> list[pathlib.Path]:
    named = sorted(set(weight_map.values()))
    for file in named:
        if not (directory / file).is_file():
            raise UserError(f"{directory}: {file} is missing, which {INDEX} names")
    for path in sorted(directory.glob("model*.safetensors")):
        if path.name not in named and not _VARIANT.fullmatch(path.name):
            raise UserError(
                f"{directory}: {INDEX} does not name {path.name};"
                " remove the one of the two that is stale"
            )
    return [directory / file for file in named]


def _plain_files(directory: pathlib.Path) -> list[pathlib.Path]:
    found = sorted(directory.glob("*.safetensors"))
    whole = [path for path in found if path.name == "model.safetensors"]
    shards = [path for path in found if _SHARD.fullmatch(path.name)]
    if whole and shards:
        raise UserError(
            f"{directory}: model.safetensors and {shards[0].name} are both there, and no {INDEX}"
            " says which counts; remove the one of the two that is stale"
        )
    paths = whole or shards or [p for p in found if not p.name.endswith(_ADAPTERS)]
    if paths:
        return paths
    if found:
        raise UserError(f"{directory} holds an adapter ({found[0].name}) and no model")
    pickles = sorted(path.name for kind in PICKLES for path in directory.glob(kind))
    if pickles:
        raise UserError(pickle_refusal(str(directory), pickles))
    raise UserError(f"{directory} holds no *.safetensors file")
