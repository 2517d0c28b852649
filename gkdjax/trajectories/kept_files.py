"""What a teacher predicted where it wrote its text, on disk beside the lines of that text.

The text of RUN/NAME.jsonl is written in chunks of lines. What was kept of a chunk is a file in
RUN/NAME.kept, named after the chunk's first line (from 0): the top k of its tokens, response after
response, of those lines that say that something was kept.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
import safetensors
import safetensors.numpy

from gkdjax.errors import UserError
from gkdjax.losses import TopKLogprobs
from gkdjax.types import KeptTopK


def write(path: pathlib.Path, start: int, kept: Sequence[KeptTopK]) -> None:
    """Writes what was kept of a chunk, of one K and one temperature.

    Args:
      path: of the lines.
      start: number of the chunk's first line.
      kept: of each of its responses that has something; with none, no file is made.
    """
    if not kept:
        return
    rows = {
        "ids": [k.topk.ids for k in kept],
        "logprobs": [k.topk.logprobs for k in kept],
        "tail_logprob": [k.topk.tail_logprob for k in kept],
        "target_logprob": [k.target_logprob for k in kept],
    }
    final = _file(path, start)
    final.parent.mkdir(exist_ok=True)
    part = final.with_name(final.name + ".part")
    safetensors.numpy.save_file(
        {name: np.concatenate(parts) for name, parts in rows.items()},
        part,
        metadata={"temperature": repr(kept[0].topk.temperature)},
    )
    part.replace(final)


def read(path: pathlib.Path, start: int, lengths: Sequence[int]) -> list[KeptTopK]:
    """What `write` was given.

    Args:
      lengths: tokens of each of these responses; with none, no file is read.

    Raises:
      UserError: the file is damaged, is gone, or holds another number of tokens.
    """
    if not lengths:
        return []
    file = _file(path, start)
    try:
        with safetensors.safe_open(file, framework="numpy") as handle:
            temperature = float(handle.metadata()["temperature"])
            names = handle.keys()
            tensors = {name: handle.get_tensor(name) for name in names}
        if any(len(tensor) != sum(lengths) for tensor in tensors.values()):
            raise ValueError(f"it does not hold the {sum(lengths)} tokens of its responses")
    except Exception as error:  # safetensors raises its own type for each kind of damage
        raise UserError(
            f"{file} cannot be read: {error}; remove {file.parent} and {path}"
        ) from None
    parts = {name: np.split(tensor, np.cumsum(lengths)[:-1]) for name, tensor in tensors.items()}
    rows = zip(parts["ids"], parts["logprobs"], parts["tail_logprob"], strict=True)
    return [
        KeptTopK(TopKLogprobs(*row, temperature), target)
        for row, target in zip(rows, parts["target_logprob"], strict=True)
    ]


def starts(path: pathlib.Path) -> list[int]:
    """The first lines of the chunks of which something was kept, in order; [] without any."""
    return sorted(int(file.stem) for file in path.with_suffix(".kept").glob("*.safetensors"))


def _file(path: pathlib.Path, start: int) -> pathlib.Path:
    return path.with_suffix(".kept") / f"{start:08d}.safetensors"
