"""Hugging Face model directories in, without torch: a checkpoint's tensors become decoder leaves.

A family's `TENSORS` table says which leaf a tensor belongs to; every tensor is accounted for once.
A stacked leaf is assembled layer by layer in each device's part of it; kernels are transposed
and numbers cast on the way. The host never holds more than one leaf.
"""

import functools
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import logging
from flax import traverse_util
from jax.sharding import Mesh, Sharding

from gkdjax.models.decoder import Decoder
from gkdjax.models.decoder_config import DecoderConfig, param_shapes
from gkdjax.models.families import registry
from gkdjax.models.families.common import CheckpointNames
from gkdjax.models.hf.model_config import load_config, load_spec, unread_keys
from gkdjax.models.hf.tensor_files import INDEX, TensorFiles, refuse_not_finite
from gkdjax.parallel.sharding_rules import Rule, ShardingRules
from gkdjax.utils.errors import UserError

# Rows read at a time. Transposed, 16 numbers of 2 bytes fill half a cache line of the target:
# 2 GB/s; the whole tensor at once, 0.3.
_STRIP = 16
_COMPUTED = "rotary_emb.inv_freq"  # a buffer in old files; transformers ignores it too
_BLOCK = 2**20  # numbers read at a time by checks
_DTYPES = tuple(np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, np.float16))

Places = dict[str, tuple[str, int | None]]  # tensor name -> (leaf path, layer of a stacked leaf)


def load_pretrained(
    directory: str | pathlib.Path,
    dtype: jnp.dtype | str | None = None,
    compute_dtype: jnp.dtype | str | None = None,
    mesh: Mesh | None = None,
    rules: Sequence[Rule] = (),
) -> tuple[Decoder, dict]:
    """Reads a model directory -> (decoder, params).

    Args:
      directory: holds config.json and *.safetensors (one file, or shards, with or without index).
      dtype: of the parameters; None keeps the checkpoint's.
      compute_dtype: of the matrix products; None takes the parameters'.
      mesh: of `parallel.mesh.make_mesh`; each device reads its part of a leaf, by
        `parallel.sharding_rules.RULES`. None: all on the default device.
      rules: precede those.

    Raises:
      UserError: no such directory, an unknown architecture, a mesh that does not divide a leaf,
        or a tensor that is missing, unknown, doubled, misshapen, wrongly typed or not finite,
        named.
    """
    config, spec = load_config(directory), load_spec(directory)
    unread = unread_keys(config)
    if unread:
        logging.warning(
            "%s/config.json: %s: transformers passes over it, and so does this run",
            *(directory, ", ".join(unread)),
        )
    shapes = param_shapes(spec)
    layout = ShardingRules() if mesh is None else ShardingRules.of(mesh, spec, rules)
    shardings = dict.fromkeys(shapes)
    if mesh is not None:  # one that does not fit is refused before anything is read
        shardings = {path: layout.sharding_of(path, shapes[path]) for path in shapes}
    files = TensorFiles(directory)
    places = tensor_places(files, spec, config["model_type"])
    check_tensors(files, spec, places)
    names: dict[str, list[str]] = {}
    for name, (path, _) in places.items():
        names.setdefault(path, []).append(name)
    dtype = None if dtype is None else jnp.dtype(dtype)
    leaves = {}
    # The largest first, while the memory that the others will take is free for its host copy.
    for path in sorted(shapes, key=lambda path: math.prod(shapes[path]), reverse=True):
        stacked = path.startswith("layers/")
        leaves[path] = _read_leaf(files, names[path], stacked, dtype, shardings[path])
    params = traverse_util.unflatten_dict(leaves, sep="/")
    stored = params["embedding"].dtype
    compute_dtype = stored if compute_dtype is None else jnp.dtype(compute_dtype)
    return Decoder(spec, stored, compute_dtype, layout=layout), params


def leaf_names(spec: DecoderConfig, layout: CheckpointNames) -> dict[str, list[str]]:
    """Leaf path -> names of its tensors: one, or one per layer, in order."""
    layers = range(spec.num_layers)
    return {
        path: [name.format(i) for i in layers] if path.startswith("layers/") else [name]
        for path, name in registry.tensor_names(spec, layout).items()
    }


def tensor_places(files: TensorFiles, spec: DecoderConfig, model_type: str) -> Places:
    """Finds the leaf of each tensor of the text decoder; all tensors must be accounted for.

    Kernels are (out, in) in the files. A tied model's head, beside the embedding or alone, is an
    "embedding" too. Left out: an image encoder's tensors, and buffers that are computed anew.

    Raises:
      UserError: tensors that are missing or unknown, named.
    """
    layouts = registry.MODEL_TYPES[model_type].LAYOUTS[model_type]
    tensors = registry.module(spec).TENSORS
    # Body, head and image encoder may each have the names of another layout.
    heads = [layout.name(tensors["unembedding"]) for layout in layouts]
    head_alone = spec.tied_embedding and any(head in files for head in heads)
    paths = ("embedding", "final_norm") if head_alone else ("embedding",)
    found = (x for path in paths for x in layouts if x.name(tensors[path]) in files)
    layout = next(found, None)
    if layout is None:
        wanted = " or ".join(repr(layout.name(tensors["embedding"])) for layout in layouts)
        raise UserError(
            f"{files.directory}: the embedding is missing: {wanted}, for model_type"
            f" {model_type!r}; there are {len(files.names)} tensors, {list(files.names[:3])}"
        )
    places: Places = {}
    tables = []  # of a tied model; one of them will do
    for path, names in leaf_names(spec, layout).items():
        if path == "unembedding":
            names = [next((head for head in heads if head in files), names[0])]
        if path == "embedding" and spec.tied_embedding:
            tables = [*names, *heads]
            names = [name for name in tables if name in files]
        stacked = path.startswith("layers/")
        places |= {name: (path, i if stacked else None) for i, name in enumerate(names)}
    foreign = tuple(start for other in layouts for start in other.foreign)
    others = [n for n in files.names if n not in places and not n.endswith(_COMPUTED)]
    refused = {
        "missing": [name for name in places if name not in files],
        "unknown": [name for name in others if not name.startswith(foreign)],
    }
    for what, names in refused.items():
        if names:
            raise UserError(
                f"{files.directory}: {what} tensors {sorted(names)[:5]} ({len(names)} in all)"
            )
    for name, file in files.absent.items():
        if name not in tables and not name.endswith(_COMPUTED):
            raise UserError(
                f"{files.directory}: tensor {name!r} is missing in {file}; {INDEX} names it"
            )
    return places


def check_tensors(files: TensorFiles, spec: DecoderConfig, places: Places) -> None:
    """Checks shapes and dtypes by the files' headers, and a second table of a tied model by value.

    Raises:
      UserError: a tensor that is misshapen or no float, or a head that is not the embedding it is
        tied to, named.
    """
    shapes = param_shapes(spec)
    for name, (path, layer) in places.items():
        file, wanted = files.file(name), shapes[path] if layer is None else shapes[path][:0:-1]
        if files.shape(name) != wanted:
            raise UserError(f"{file}: tensor {name!r} has shape {files.shape(name)}, not {wanted}")
        if files.dtype(name) not in _DTYPES:
            raise UserError(
                f"{file}: tensor {name!r} is wrongly typed: {files.dtype(name)}, where only"
                f" {', '.join(map(str, _DTYPES))} are read"
            )
    first, *others = (name for name, (path, _) in places.items() if path == "embedding")
    for other in others:
        _check_same(files, other, first)


def check_numbers(files: TensorFiles, places: Places) -> None:
    """Reads all of the decoder's numbers without loading them.

    Raises:
      UserError: one is NaN or infinite; the file and the tensor are named.
    """
    for name in places:
        rows, *rest = files.shape(name)
        height = max(1, _BLOCK // math.prod(rest))
        for start in range(0, rows, height):
            part = files.read(name, slice(start, min(start + height, rows)))
            refuse_not_finite(files.file(name), name, part)


def _read_leaf(
    files: TensorFiles,
    names: list[str],
    stacked: bool,
    dtype: np.dtype | None,
    sharding: Sharding | None,
) -> jax.Array:
    """Reads one leaf into its place: (L, in, out) if `stacked`, else the first tensor.

    Without a dtype it is the tensors', or float32 where they have several; without a sharding the
    leaf goes to the default device, uncommitted.
    """
    names = names if stacked else names[:1]
    if dtype is None:
        dtypes = {files.dtype(name) for name in names}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    shape = files.shape(names[0])
    if stacked:
        shape = (len(names), *shape[::-1])

    @functools.cache  # several devices may hold the same part
    def read(*bounds: tuple[int, int]) -> np.ndarray:
        part = np.empty([stop - start for start, stop in bounds], dtype)
        cuts = [slice(start, stop) for start, stop in bounds]
        if not stacked:
            _fill(part, files, names[0], cuts)
            return part
        for target, name in zip(part, names[cuts[0]], strict=True):
            _fill(target.T, files, name, cuts[:0:-1])  # a vector is its own transpose
        return part

    def part(index: tuple[slice, ...]) -> np.ndarray:
        return read(*(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True)))

    if sharding is None:
        leaf = jax.device_put(part((slice(None),) * len(shape)))
    else:
        leaf = jax.make_array_from_callback(shape, sharding, part)
    return leaf.block_until_ready()  # so that the host holds the parts of one leaf at a time


def _fill(target: np.ndarray, files: TensorFiles, name: str, cuts: list[slice]) -> None:
    """Copies what `cuts` select of a tensor into `target`, whose axes are the tensor's."""
    rows, *columns = cuts
    height = _STRIP if columns else target.size
    for start in range(rows.start, rows.stop, height):
        stop = min(start + height, rows.stop)
        strip = files.read(name, (slice(start, stop), *columns))
        refuse_not_finite(files.file(name), name, strip)
        target[start - rows.start : stop - rows.start] = strip


def _check_same(files: TensorFiles, head: str, embedding: str) -> None:
    rows = files.shape(head)[0]
    for start in range(0, rows, 1024):  # a few megabytes of each at a time
        cut = slice(start, min(start + 1024, rows))
        a, b = (files.read(name, cut).astype(np.float32) for name in (head, embedding))
        if not np.array_equal(a, b, equal_nan=True):
            raise UserError(
                f"{files.directory}: tie_word_embeddings is true, and {head!r} differs from"
                f" {embedding!r}; set it to false in config.json if the head is a parameter of its"
                " own, or remove the tensor"
            )
