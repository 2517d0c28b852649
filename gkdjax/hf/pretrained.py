"""Hugging Face directories in: config.json and safetensors, without torch.

A family's `TENSORS` table says where each tensor goes; every tensor of a checkpoint is accounted
for exactly once.
"""

import math
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
from absl import logging
from flax import traverse_util
from jax.sharding import Mesh

from gkdjax.hf import config_keys, leaves
from gkdjax.hf.leaves import source_names
from gkdjax.hf.model_config import load_config, load_spec
from gkdjax.hf.tensor_files import TensorFiles
from gkdjax.layout import Layout, Rule
from gkdjax.models.decoder import Decoder
from gkdjax.models.spec import param_shapes


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
      mesh: of `sharding.make_mesh`: the leaves are cut by `layout.RULES`, and each device's
        part is read for itself. None: all on the default device.
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
    lies = Layout() if mesh is None else Layout.of(mesh, spec, rules)
    places = {} if mesh is None else {path: lies.place(path, shapes[path]) for path in shapes}
    files = TensorFiles(directory)
    _, known = source_names(files, spec, config["model_type"])
    leaves.check_tensors(files, spec, known)
    names = leaves.leaf_tensors(known)
    dtype = None if dtype is None else jnp.dtype(dtype)
    read = {}
    # The largest first, while the memory that the others will take is free for its host copy.
    for path in sorted(shapes, key=lambda path: math.prod(shapes[path]), reverse=True):
        stacked = path.startswith("layers/")
        read[path] = leaves.read_leaf(files, names[path], stacked, dtype, places.get(path))
    params = traverse_util.unflatten_dict(read, sep="/")
    stored = params["embedding"].dtype
    compute_dtype = stored if compute_dtype is None else jnp.dtype(compute_dtype)
    return Decoder(spec, stored, compute_dtype, layout=lies), params
