"""Writes a small random Gemma 3 with a vocabulary of any size, for trials.

    python -m gkdjax.tools.make_tiny --out=DIR --width=64 --layers=3 --vocab_size=262144

Tokenizer and chat template are the quickstart's, which know far fewer ids than a real vocabulary.
The rows past them are as random as the others, but never sampled: channel 0 carries the same
constant in every token of the tokenizer, no layer can write to it (its post-norms are zero there,
whatever is trained below them), and the final norm lifts it to at least 1. There the rows past the
tokenizer hold -40, so that their logits lie some 40 below the others'.

This module imports no jax, so that a config file can call it before jax may be loaded.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import ml_dtypes
import numpy as np
import safetensors.numpy

from gkdjax import tools
from gkdjax.config import ASSETS
from gkdjax.models.decoder_config import DecoderConfig, param_shapes
from gkdjax.models.families import gemma3
from gkdjax.utils import files
from gkdjax.utils.errors import UserError

_SOURCE = ASSETS / "quickstart/student"
_COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
_COPIED += ("chat_template.jinja",)
_SETTINGS = "make_tiny.json"  # a directory that holds it was made here, with these
_WEIGHTS = "model.safetensors"
_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
_NEVER = -40.0  # logit of an id that the tokenizer does not know


def make_tiny(
    directory: str | pathlib.Path,
    *,
    width: int,
    layers: int,
    vocab_size: int,
    seed: int,
    dtype: str = "bfloat16",
) -> None:
    """Writes a Hugging Face model directory, whole or not at all; one of the same settings stays.

    Args:
      directory: absent, empty, or made here before.
      width: hidden size, at least 16.
      layers: local and global ones in turn; at least 2, so that there are both.
      vocab_size: rows of the embedding; at least as many as the tokenizer has ids.
      seed, dtype: of the weights; "bfloat16" or "float32".

    Raises:
      UserError: a setting is out of range, or `directory` holds something else.
    """
    directory = pathlib.Path(directory)
    settings = {"width": width, "layers": layers, "vocab_size": vocab_size}
    settings |= {"seed": seed, "dtype": dtype}
    known_ids = _known_ids()
    for name, least in {"width": 16, "layers": 2, "vocab_size": known_ids, "seed": 0}.items():
        if settings[name] < least:
            raise UserError(f"{name} = {settings[name]}: must be at least {least}")
    if dtype not in _DTYPES:
        raise UserError(f"dtype = {dtype!r}: choose one of {', '.join(_DTYPES)}")
    if _is_made(directory, settings):
        return
    kinds = ("sliding_attention", "full_attention")
    config = json.loads((_SOURCE / "config.json").read_text()) | {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "layer_types": [kinds[i % 2] for i in range(layers)],
        "vocab_size": vocab_size,
        "dtype": dtype,
    }
    tensors = _tensors(gemma3.decoder_spec(config), known_ids, seed, _DTYPES[dtype])
    with files.writing(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: the runs of a sweep may all come here at the same time.
        part = tempfile.TemporaryDirectory(dir=directory.parent, prefix=directory.name + ".")
    with part, files.writing(directory):
        made = pathlib.Path(part.name) / "made"  # the directory around it is its owner's alone
        made.mkdir()
        for name in _COPIED:
            files.write_bytes(made / name, (_SOURCE / name).read_bytes())
        for name, fields in (("config.json", config), (_SETTINGS, settings)):
            files.write_text(made / name, json.dumps(fields, indent=2, sort_keys=True) + "\n")
        # Not save_file, which makes files that nobody else may read.
        weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
        files.write_bytes(made / _WEIGHTS, weights)
        try:
            made.rename(directory)
        except OSError:
            if not _is_made(directory, settings):  # by another process, meanwhile
                raise


def _is_made(directory: pathlib.Path, settings: dict) -> bool:
    """Tells whether the model is there; UserError for a part of it or anything else."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    names = (_SETTINGS, _WEIGHTS, "config.json", *_COPIED)
    if not all((directory / name).is_file() for name in names):
        raise UserError(f"{directory} is not a whole tiny model; remove it, or name another place")
    found = json.loads((directory / _SETTINGS).read_text())
    if found != settings:
        raise UserError(
            f"{directory} holds a tiny model of other settings: {found}, not {settings};"
            " remove it, or name another place"
        )
    return True


def _known_ids() -> int:
    """Number of ids of the tokenizer, from 0."""
    tokenizer = json.loads((_SOURCE / "tokenizer.json").read_text())
    added = [token["id"] for token in tokenizer["added_tokens"]]
    return 1 + max(*tokenizer["model"]["vocab"].values(), *added)


def _tensors(spec: DecoderConfig, known_ids: int, seed: int, dtype: type) -> dict[str, np.ndarray]:
    """HF name -> weights: kernels of deviation 1/sqrt(fan in), norms that scale by 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for path, shape in param_shapes(spec).items():
        name = gemma3.TENSORS[path]
        if path == "embedding":
            tensors[name] = _embedding(rng, shape, known_ids, dtype)
        elif path == "final_norm":
            tensors[name] = np.zeros(shape, dtype)
            # Undoes, for channel 0, the most that the division by the root mean square can do:
            # the embedding's is below 2, and each half of a layer adds a vector of at most 1.
            tensors[name][0] = 2 + 2 * spec.num_layers - 1
        else:
            for layer in range(spec.num_layers):
                tensors[name.format(layer)] = _layer_tensor(rng, path, shape[1:], dtype)
    return tensors


def _layer_tensor(rng, path: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    if not path.endswith("_norm"):
        return _normal(rng, shape[::-1], shape[0]).astype(dtype)  # stored (out, in)
    weight = np.zeros(shape, dtype)
    if path.endswith("_post_norm"):
        weight[0] = -1.0  # Gemma's norms scale by 1 + weight: nothing passes
    return weight


def _embedding(rng, shape: tuple[int, ...], known_ids: int, dtype: type) -> np.ndarray:
    rows, width = shape
    table = np.empty(shape, dtype)
    for start in range(0, rows, 2**14):  # float32 numbers of all rows would be twice the table
        part = table[start : start + 2**14]
        part[:] = _normal(rng, part.shape, width)
    table[:known_ids, 0] = width**-0.5  # 1 after the embedding's scale
    table[known_ids:, 0] = _NEVER
    return table


def _normal(rng, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32) * np.float32(fan_in**-0.5)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("make_tiny", description=__doc__.splitlines()[0])
    parser.add_argument("--out", dest="directory", required=True, help="Directory to write.")
    parser.add_argument("--width", type=int, default=64, help="Hidden size.")
    parser.add_argument("--layers", type=int, default=3, help="Local and global ones in turn.")
    parser.add_argument("--vocab_size", type=int, default=262_144, help="Rows of the embedding.")
    parser.add_argument("--seed", type=int, default=0, help="Of the weights.")
    parser.add_argument("--dtype", default="bfloat16", choices=_DTYPES, help="Of the weights.")
    return tools.run(parser, lambda flags: make_tiny(**vars(flags)), argv)


if __name__ == "__main__":
    sys.exit(main())
