"""The decoder's leaves from a checkpoint's tensors, slice by slice, straight into their sharding.

A stacked leaf is assembled layer by layer in the buffer of each device's own part of it; kernels
are transposed and numbers cast on the way. Nothing larger than that part is ever held.

Hugging Face directories in: config.json and safetensors, without torch.

A family's `TENSORS` table says where each tensor goes; every tensor of a checkpoint is accounted
for exactly once.
"""

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
from gkdjax.models.hf import config_keys
from gkdjax.models.hf.model_config import load_config, load_spec
from gkdjax.models.hf.tensor_files import INDEX, TensorFiles, is_finite
from gkdjax.parallel.sharding_rules import Rule, ShardingRules
from gkdjax.utils.errors import UserError

# Rows read at a time. Transposed, 16 numbers of 2 bytes fill half a cache line of the target:
# 2 GB/s; the whole tensor at once, 0.3.
_STRIP = 16
_COMPUTED = "rotary_emb.inv_freq"  # a buffer that old files hold; transformers ignores it too
_BLOCK = 2**20  # numbers read at a time where nothing is made of them
_DTYPES = tuple(np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, np.float16))


def source_names(
    files: TensorFiles, spec: DecoderConfig, model_type: str
) -> tuple[CheckpointNames, dict[str, tuple[str, int | None]]]:
    """Which leaf each tensor of a checkpoint is; checks that all of them are accounted for.

    Args:
      files: of the model directory.
      spec: of its config.json.
      model_type: of its config.json.

    Returns:
      The layout that the files have, and tensor name -> (leaf path, layer; None where the leaf is
      not stacked) for all tensors of the text decoder, as they stand in the files: kernels
      (out, in). A tied model whose files hold the head, too or alone, has it as an "embedding".
      What is in `files` and not in here is an image encoder's (`CheckpointNames.foreign`), or a
      buffer that is computed anew.

    Raises:
      UserError: tensors that are missing or unknown, named.
    """
    layout = _layout(files, spec, model_type)
    layouts = registry.MODEL_TYPES[model_type].LAYOUTS[model_type]
    tensors = registry.module(spec).TENSORS
    # Body, head and image encoder may each have the names of another layout.
    heads = [other.name(tensors["unembedding"]) for other in (layout, *layouts)]
    foreign = tuple(start for other in layouts for start in other.foreign)
    known: dict[str, tuple[str, int | None]] = {}
    for path, names in leaf_names(spec, layout).items():
        if path == "unembedding":
            names = [next((head for head in heads if head in files), heads[0])]
        stacked = path.startswith("layers/")
        known |= {name: (path, i if stacked else None) for i, name in enumerate(names)}
    tied = [layout.name(tensors["embedding"]), *heads] if spec.tied_embedding else []
    for name in tied:  # one of them will do; `_layout` has found it
        known[name] = ("embedding", None)
        if name not in files:
            del known[name]
    _refuse_names(files, "missing", [name for name in known if name not in files])
    for name, file in files.absent.items():
        if name not in tied and not name.endswith(_COMPUTED):
            raise UserError(
                f"{files.directory}: tensor {name!r} is missing in {file}; {INDEX} names it"
            )
    others = [n for n in files.names if n not in known and not n.endswith(_COMPUTED)]
    _refuse_names(files, "unknown", [n for n in others if not n.startswith(foreign)])
    return layout, known


def leaf_tensors(known: dict[str, tuple[str, int | None]]) -> dict[str, list[str]]:
    """Inverts what `source_names` returns: leaf path -> its tensors' names, by layer.

    A leaf that is not stacked is made of the first of them.
    """
    names: dict[str, list[str]] = {}
    for name, (path, _) in known.items():
        names.setdefault(path, []).append(name)
    return names


def leaf_names(spec: DecoderConfig, layout: CheckpointNames) -> dict[str, list[str]]:
    """Leaf path -> names of the tensors that it is made of: one, or one a layer, in order."""
    return {
        path: (
            [template.format(i) for i in range(spec.num_layers)]
            if path.startswith("layers/")
            else [template]
        )
        for path, template in registry.tensor_names(spec, layout).items()
    }


def check_tensors(
    files: TensorFiles, spec: DecoderConfig, known: dict[str, tuple[str, int | None]]
) -> None:
    """Checks shapes and dtypes by the files' headers, and a second table of a tied model by value.

    Args:
      files, spec: as in `source_names`.
      known: the names that it returns.

    Raises:
      UserError: a tensor that is misshapen or no float, or a head that is not the embedding it is
        tied to, named.
    """
    shapes = param_shapes(spec)
    first: dict[str, str] = {}  # leaf path -> its first tensor
    for name, (path, layer) in known.items():
        wanted = shapes[path] if layer is None else shapes[path][:0:-1]
        if files.shape(name) != wanted:
            raise UserError(
                f"{files.file(name)}: tensor {name!r} has shape {files.shape(name)}, not {wanted}"
            )
        _check_dtype(files, name)
        first.setdefault(path, name)
    for name, (path, _) in known.items():
        if path == "embedding" and name != first[path]:
            _check_same(files, name, first[path])


def check_numbers(files: TensorFiles, known: dict[str, tuple[str, int | None]]) -> None:
    """Reads all of the decoder's numbers, for who does not load them.

    Raises:
      UserError: one that is NaN or infinite; the file and the tensor are named.
    """
    for name in known:
        rows, *rest = files.shape(name)
        height = max(1, _BLOCK // math.prod(rest))
        for start in range(0, rows, height):
            part = files.read(name, slice(start, min(start + height, rows)))
            _refuse_not_finite(files, name, part)


def read_leaf(
    files: TensorFiles,
    names: list[str],
    stacked: bool,
    dtype: np.dtype | None,
    sharding: Sharding | None,
) -> jax.Array:
    """One leaf of the decoder, in its place.

    Args:
      files: of the model directory.
      names: of its tensors, see `leaf_tensors`; they have passed `check_tensors`.
      stacked: the leaf has a layer axis before those of the tensors; kernels are (L, in, out).
      dtype: of the leaf; None: of its tensors, float32 where they have several.
      sharding: each device's part is read, once where several hold the same. None: the whole leaf
        goes to the default device, uncommitted.

    Raises:
      UserError: a number that is NaN or infinite; the file and the tensor are named.
    """
    names = names if stacked else names[:1]
    if dtype is None:
        dtypes = {files.dtype(name) for name in names}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    shape = files.shape(names[0])
    if stacked:
        shape = (len(names), *shape[::-1])
    parts: dict[tuple, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        cuts = [slice(*cut.indices(size)[:2]) for cut, size in zip(index, shape, strict=True)]
        key = tuple((cut.start, cut.stop) for cut in cuts)
        if key not in parts:
            parts[key] = _read_part(files, names, stacked, cuts, dtype)
        return parts[key]

    if sharding is None:
        leaf = jax.device_put(read((slice(None),) * len(shape)))
    else:
        leaf = jax.make_array_from_callback(shape, sharding, read)
    return leaf.block_until_ready()  # so that the host holds the parts of one leaf at a time


def _read_part(files, names, stacked: bool, cuts: list[slice], dtype: np.dtype) -> np.ndarray:
    part = np.empty([cut.stop - cut.start for cut in cuts], dtype)
    if not stacked:
        _fill(part, files, names[0], cuts)
        return part
    layers, *cuts = cuts
    for target, name in zip(part, names[layers], strict=True):
        _fill(target.T, files, name, cuts[::-1])  # a vector is its own transpose
    return part


def _fill(target: np.ndarray, files: TensorFiles, name: str, cuts: list[slice]) -> None:
    """Copies what `cuts` take of a tensor into `target`, whose axes are the tensor's."""
    rows, *columns = cuts
    height = _STRIP if columns else target.size
    for start in range(rows.start, rows.stop, height):
        stop = min(start + height, rows.stop)
        strip = files.read(name, (slice(start, stop), *columns))
        _refuse_not_finite(files, name, strip)
        target[start - rows.start : stop - rows.start] = strip


def _refuse_not_finite(files: TensorFiles, name: str, part: np.ndarray) -> None:
    if not is_finite(part):
        raise UserError(
            f"{files.file(name)}: tensor {name!r} holds NaN or infinity, so the file is damaged or"
            " the training that wrote it had failed; get it once more, or take an earlier"
            " checkpoint"
        )


def _layout(files: TensorFiles, spec: DecoderConfig, model_type: str) -> CheckpointNames:
    layouts = registry.MODEL_TYPES[model_type].LAYOUTS[model_type]
    tensors = registry.module(spec).TENSORS
    template = tensors["embedding"]
    has_head = any(layout.name(tensors["unembedding"]) in files for layout in layouts)
    for path in ("embedding", "final_norm") if spec.tied_embedding and has_head else ("embedding",):
        for layout in layouts:
            if layout.name(tensors[path]) in files:
                return layout
    wanted = " or ".join(repr(layout.name(template)) for layout in layouts)
    raise UserError(
        f"{files.directory}: the embedding is missing: {wanted}, for model_type {model_type!r};"
        f" there are {len(files.names)} tensors, {list(files.names[:3])}"
    )


def _refuse_names(files: TensorFiles, what: str, names: list[str]) -> None:
    if names:
        raise UserError(
            f"{files.directory}: {what} tensors {sorted(names)[:5]} ({len(names)} in all)"
        )


def _check_dtype(files: TensorFiles, name: str) -> None:
    dtype = files.dtype(name)
    if dtype not in _DTYPES:
        raise UserError(
            f"{files.file(name)}: tensor {name!r} is wrongly typed: {dtype}, where only"
            f" {', '.join(map(str, _DTYPES))} are read"
        )


def _check_same(files: TensorFiles, head: str, embedding: str) -> None:
    rows = files.shape(head)[0]
    for start in range(0, rows, 1024):  # a few megabytes of each at a time
        cut = slice(start, min(start + 1024, rows))
        a, b = (files.read(name, cut) for name in (head, embedding))
        same_bits = a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8))
        if not same_bits and not np.array_equal(a.astype(np.float32), b.astype(np.float32)):
            raise UserError(
                f"{files.directory}: tie_word_embeddings is true, and {head!r} differs from"
                f" {embedding!r}; set it to false in config.json if the head is a parameter of its"
                " own, or remove the tensor"
            )


def load_pretrained(
    directory: str | pathlib.Path,
    dtype: jnp.dtype | str | None = None,
    compute_dtype: jnp.dtype | str | None = None,
    mesh: Mesh | None = None,
    rules: Sequence[Rule] = (),
) -> tuple[Decoder, dict]:
    """Reads a model directory -> (decoder, params).

    One leaf after the other is read into its place, so the host holds no more than one of them
    (and, where a CPU is the device, those that were read before).

    Args:
      directory: holds config.json and *.safetensors (one file, or shards, with or without index).
      dtype: of the parameters; None keeps the checkpoint's.
      compute_dtype: of the matrix products; None takes the parameters'.
      mesh: of `parallel.mesh.make_mesh`: the leaves are cut by `parallel.sharding_rules.RULES`, and
        each device's part is read for itself. None: all on the default device.
      rules: that come before those.

    Raises:
      UserError: no such directory, an unknown architecture, a mesh that does not divide a leaf,
        or a tensor that is missing, unknown, doubled, misshapen, wrongly typed or not finite,
        named.
    """
    config, spec = load_config(directory), load_spec(directory)
    unread = config_keys.passed_over(config)
    if unread:
        logging.warning(
            "%s/config.json: %s: transformers passes over it, and so does this run",
            *(directory, ", ".join(unread)),
        )
    shapes = param_shapes(spec)
    lies = ShardingRules() if mesh is None else ShardingRules.of(mesh, spec, rules)
    places = {} if mesh is None else {path: lies.sharding_of(path, shapes[path]) for path in shapes}
    files = TensorFiles(directory)
    _, known = source_names(files, spec, config["model_type"])
    check_tensors(files, spec, known)
    names = leaf_tensors(known)
    dtype = None if dtype is None else jnp.dtype(dtype)
    read = {}
    # The largest first, while the memory that the others will take is free for its host copy.
    for path in sorted(shapes, key=lambda path: math.prod(shapes[path]), reverse=True):
        stacked = path.startswith("layers/")
        read[path] = read_leaf(files, names[path], stacked, dtype, places.get(path))
    params = traverse_util.unflatten_dict(read, sep="/")
    stored = params["embedding"].dtype
    compute_dtype = stored if compute_dtype is None else jnp.dtype(compute_dtype)
    return Decoder(spec, stored, compute_dtype, layout=lies), params
