"""Hugging Face directories in and out: config.json and safetensors, without torch.

A family's `TENSORS` table says where each tensor goes; every tensor of a checkpoint is accounted
for exactly once.
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from huggingface_hub.errors import StrictDataclassError  # how transformers' configs refuse a field

from gkdjax.errors import UserError
from gkdjax.models import families
from gkdjax.models.decoder import Decoder
from gkdjax.models.hf_tables import Layout
from gkdjax.models.spec import DecoderSpec, param_shapes

# Everything beside the weights that a model directory needs to stay usable after training.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def load_pretrained(
    directory: str,
    dtype: jnp.dtype | str | None = None,
    compute_dtype: jnp.dtype | str | None = None,
) -> tuple[Decoder, dict]:
    """Reads a model directory -> (decoder, params).

    Args:
      directory: holds config.json and *.safetensors (one file, or shards, with or without index).
      dtype: of the parameters; None keeps the checkpoint's.
      compute_dtype: of the matrix products; None takes the parameters'.

    Raises:
      UserError: no such directory, an unknown architecture, or a tensor that is missing, unknown,
        doubled or misshapen, named.
    """
    spec = load_spec(directory)
    leaves = _read_leaves(pathlib.Path(directory), spec)
    params: dict = {"layers": {}}
    for path, leaf in leaves.items():
        node, name = (params["layers"], path[7:]) if path.startswith("layers/") else (params, path)
        node[name] = jnp.asarray(leaf, dtype=dtype)
    stored_dtype = params["embedding"].dtype
    compute_dtype = stored_dtype if compute_dtype is None else jnp.dtype(compute_dtype)
    return Decoder(spec, param_dtype=stored_dtype, compute_dtype=compute_dtype), params


def load_config(directory: str) -> dict:
    """The parsed config.json of a model directory, of a supported architecture.

    Raises:
      UserError: it is missing, does not parse, or names an architecture that is not supported.
    """
    path = pathlib.Path(directory)
    if not path.is_dir():
        raise UserError(f"no such model directory: {directory}")
    if not (path / "config.json").is_file():
        raise UserError(f"{directory} holds no config.json, so it is not a model directory")
    try:
        config = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{path / 'config.json'} does not parse: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path / 'config.json'} must hold a JSON object")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in families.MODEL_TYPES:
        raise UserError(
            f"{path / 'config.json'}: model_type {model_type!r} is not supported;"
            f" supported: {', '.join(sorted(families.MODEL_TYPES))}"
        )
    return config


def load_spec(directory: str) -> DecoderSpec:
    """The decoder's numbers, from config.json alone (cheap: no weights are read)."""
    config = load_config(directory)
    try:
        return families.MODEL_TYPES[config["model_type"]].decoder_spec(config)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"{directory}/config.json: {error}") from error


def stored_dtype(directory: str) -> jnp.dtype:
    """The dtype of a model directory's embedding, and so of its weights."""
    name = _tensor_names(load_spec(directory))["embedding"]
    for file in sorted(pathlib.Path(directory).glob("*.safetensors")):
        with safetensors.safe_open(file, framework="numpy") as handle:
            if name in handle.keys():  # noqa: SIM118 (no mapping)
                return handle.get_slice(name)[:1].dtype
    raise UserError(f"{directory}: tensor {name!r} is missing")


def save_pretrained(directory: str, spec: DecoderSpec, params: dict, source: str) -> None:
    """Writes `params` as a model directory; config, tokenizer and template come from `source`.

    The tensors are written in the dtype of `params`. The directory appears whole or not at all.
    """
    final = pathlib.Path(directory)
    part = final.with_name(final.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir(parents=True)
    try:
        _write(part, spec, params, pathlib.Path(source))
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)


def _write(directory: pathlib.Path, spec: DecoderSpec, params: dict, source: pathlib.Path) -> None:
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    tensors = {}
    for path, template in _tensor_names(spec).items():
        leaf = params["layers"][path[7:]] if path.startswith("layers/") else params[path]
        leaf = np.asarray(jax.device_get(leaf))
        if path.startswith("layers/"):
            for i in range(spec.num_layers):
                matrix = leaf[i].T if leaf.ndim == 3 else leaf[i]
                tensors[template.format(i)] = np.ascontiguousarray(matrix)
        else:
            tensors[template] = np.ascontiguousarray(leaf)
    save_tensors(tensors, directory / "model.safetensors")
    _set_dtype(directory / "config.json", str(params["embedding"].dtype))


def save_tensors(tensors: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Writes a safetensors file that others may read as they may any new file of this process."""
    path.touch()
    mode = path.stat().st_mode
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # the library leaves it to its owner alone


def tensor_name(spec: DecoderSpec, path: str, layer: int) -> str:
    """The HF name of one layer's part of a stacked leaf, such as "layers/q_proj" of layer 3."""
    return _tensor_names(spec)[path].format(layer)


def _tensor_names(spec: DecoderSpec) -> dict[str, str]:
    return families.tensor_names(spec, Layout())


def _set_dtype(path: pathlib.Path, dtype: str) -> None:
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)  # the name that older files use
    path.write_text(json.dumps(config | {"dtype": dtype}, indent=2, sort_keys=True) + "\n")


def _read_leaves(directory: pathlib.Path, spec: DecoderSpec) -> dict[str, np.ndarray]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory} holds no *.safetensors file")
    where: dict[str, pathlib.Path] = {}
    handles = {}
    for file in files:
        try:
            handles[file] = safetensors.safe_open(file, framework="numpy")
        except Exception as error:  # safetensors raises its own type for each kind of damage
            raise UserError(f"{file} is not a readable safetensors file: {error}") from error
        for name in handles[file].keys():  # noqa: SIM118 (no mapping)
            if name in where:
                raise UserError(f"tensor {name!r} stands in {where[name].name} and in {file.name}")
            where[name] = file

    def take(name, shape):
        if name not in where:
            raise UserError(f"{directory}: tensor {name!r} is missing")
        tensor = handles[where.pop(name)].get_tensor(name)
        if tensor.shape != shape:
            raise UserError(f"{directory}: tensor {name!r} has shape {tensor.shape}, not {shape}")
        return tensor

    leaves = {}
    for path, shape in param_shapes(spec).items():
        name = _tensor_names(spec)[path]
        if not path.startswith("layers/"):
            leaves[path] = take(name, shape)
        elif len(shape) == 3:  # a stacked kernel; HF keeps each (out, in)
            parts = [take(name.format(i), shape[:0:-1]).T for i in range(shape[0])]
            leaves[path] = np.stack(parts)
        else:
            leaves[path] = np.stack([take(name.format(i), shape[1:]) for i in range(shape[0])])
    if where:
        raise UserError(f"{directory}: unknown tensors {sorted(where)[:5]} ({len(where)} in all)")
    return leaves
