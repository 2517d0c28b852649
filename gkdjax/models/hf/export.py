"""Model directories out: a Hugging Face model or a PEFT adapter.

Tensors are made one at a time, so that a model in training is not in memory twice. All processes
make them, because each holds a part, and the leader writes them.
"""

import dataclasses
import functools
import json
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np

from gkdjax.models import lora
from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.families.common import CheckpointNames
from gkdjax.models.hf import load, peft, writer
from gkdjax.models.hf.model_config import load_config
from gkdjax.models.hf.tensor_files import INDEX, TensorFiles
from gkdjax.parallel import mesh
from gkdjax.utils import files as json_files
from gkdjax.utils.errors import UserError

SHARD_BYTES = 5 * 10**9  # as the hub recommends and transformers writes

ENDING = "ending.json"  # `Ending` in a run's directory
_GENERATION = "generation_config.json"
# The tokenizer with its chat template, and how text is generated: beside an adapter too.
_TEXT_COMPANIONS = (
    _GENERATION,
    *("tokenizer*.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
_COMPANIONS = (
    *("config.json", "preprocessor_config.json", "processor_config.json"),
    *_TEXT_COMPANIONS,
)
# The terms on which the source may be passed on: Llama's USE_POLICY.md, for example.
_TERMS = re.compile(
    r"[\w .-]*(licen[cs]e|use[_ -]?policy|notice|terms[_ -]of[_ -]use|copying)[\w -]*"
    r"([.]\d+)*([.](txt|md|rst))?",
    re.IGNORECASE,
)


class Ending(NamedTuple):
    """The tokens that end a response of the student, for generation_config.json."""

    stop_ids: tuple[int, ...]  # any of them; the chat template's end of turn is first
    pad_id: int  # for a generation_config.json that names none


def export_merged(
    directory: str | pathlib.Path,
    spec: DecoderConfig,
    params: dict,
    adapters: dict[str, lora.Adapter] | None,
    source: str | pathlib.Path,
    shard_bytes: int = SHARD_BYTES,
    ending: Ending | None = None,
) -> None:
    """Writes a model with the source's tensor names and dtypes, as transformers loads it.

    Tensors outside the text decoder, an image encoder's, are copied from the source.

    Args:
      directory: replaced as a whole, see `writer.whole_directory`; it may be the source.
      spec, params: of the frozen base, or all trained parameters.
      adapters: merged into the base.
      source: the directory of the model that the student came from.
      shard_bytes: largest size of a file; more make several, with an index.
      ending: for generation_config.json; None keeps the source's.

    Raises:
      UserError: the source is gone or changed, or a number does not fit the source's float16.
    """
    root = pathlib.Path(source)
    files = TensorFiles(root)
    places = load.tensor_places(files, spec, load_config(root)["model_type"])
    tables = tuple(files.dtype(n) for n, (path, _) in places.items() if path == "embedding")
    tensors = {}
    for name in files.names:
        dtype = files.dtype(name)
        if name in places:
            path, layer = places[name]
            # A tied head of another dtype stays the embedding: both are rounded to both dtypes.
            casts = (*tables, dtype) if path == "embedding" else (dtype,)
            adapter = (adapters or {}).get(path)
            make = functools.partial(_leaf_tensor, params, adapter, name, path, layer, casts)
        else:
            make = functools.partial(files.read, name)
        tensors[name] = writer.Tensor(dtype, files.shape(name), make)
    with writer.whole_directory(directory) as part:
        _copy_companions(root, part, _COMPANIONS, ending)
        _write_shards(part, tensors, shard_bytes)


def export_adapter(
    directory: str | pathlib.Path,
    spec: DecoderConfig,
    adapters: dict[str, lora.Adapter],
    source: str | pathlib.Path,
    base: str | None = None,
    ending: Ending | None = None,
) -> None:
    """Writes what `peft.PeftModel.from_pretrained` loads, float32 A (r, in) and B (out, r).

    The source's tokenizer, chat template, generation_config.json and licences are copied. PEFT
    generates with the base's own generation_config.json unless it is given this one.

    Args:
      directory, spec, ending: as for `export_merged`.
      source: the directory of the base.
      base: the base's name for adapter_config.json; None: the absolute path of `source`.
    """
    model_type = load_config(source)["model_type"]
    base = str(pathlib.Path(source).absolute()) if base is None else base
    with writer.whole_directory(directory) as part:
        _copy_companions(pathlib.Path(source), part, _TEXT_COMPANIONS, ending)
        peft.save_adapter(part, spec, adapters, model_type, base)


def save_pretrained(
    directory: str | pathlib.Path, spec: DecoderConfig, params: dict, source: str | pathlib.Path
) -> None:
    """Writes a model of new weights, in the family's plain layout and the dtypes of `params`.

    `source` has its config.json, tokenizer and chat template; `directory`, replaced as a whole, may
    be the same.
    """
    tensors = {}
    for path, names in load.leaf_names(spec, CheckpointNames()).items():
        leaf, stacked = _leaf(params, path), path.startswith("layers/")
        shape = leaf.shape[:0:-1] if stacked else leaf.shape
        for i, name in enumerate(names):
            layer = i if stacked else None
            make = functools.partial(_leaf_tensor, params, None, name, path, layer, [leaf.dtype])
            tensors[name] = writer.Tensor(leaf.dtype, shape, make)
    with writer.whole_directory(directory) as part:
        _copy_companions(pathlib.Path(source), part, _COMPANIONS, None)
        config = json_files.read_object(part / "config.json")
        config.pop("torch_dtype", None)  # the name that older files use
        _write_json(part / "config.json", config | {"dtype": str(params["embedding"].dtype)})
        _write_shards(part, tensors, SHARD_BYTES)


def _leaf_tensor(
    params: dict,
    adapter: lora.Adapter | None,
    name: str,
    path: str,
    layer: int | None,
    casts: Sequence[np.dtype],
) -> np.ndarray:
    """The tensor `name` of a leaf, or of one layer of a stacked one, cast in turn to `casts`."""
    leaf = _leaf(params, path)
    if layer is not None:
        leaf = _layer(leaf, adapter, layer)
    with np.errstate(over="ignore"):  # an error below, with a name
        tensor = np.asarray(mesh.fetch(leaf))
        for dtype in casts:
            tensor = tensor.astype(dtype, copy=False)
    if tensor.dtype == np.float16 and not np.isfinite(tensor).all():
        raise UserError(
            f"{name} holds numbers beyond 65504, the most that float16, the source's dtype, can"
            " hold; start from a bfloat16 or float32 copy of the source"
        )
    return tensor


def _layer(leaf: jax.Array, adapter: lora.Adapter | None, layer: int) -> jax.Array:
    """One layer of a stacked leaf, its adapter merged; a kernel is (out, in), as HF has it."""
    if isinstance(leaf, np.ndarray):  # jax would take the whole of it to the device
        leaf = leaf[layer : layer + 1]
    return _cut(leaf, adapter, layer)


@jax.jit  # a program for each shape: `layer` is an argument like the others
def _cut(leaf: jax.Array, adapter: lora.Adapter | None, layer: int) -> jax.Array:
    def one(stacked):
        return stacked if len(stacked) == 1 else jax.lax.dynamic_slice_in_dim(stacked, layer, 1)

    part = one(leaf)
    if adapter is not None:
        adapter = dataclasses.replace(adapter, a=one(adapter.a), b=one(adapter.b))
        # In float32, so that the sum is rounded once, to the dtype of the file.
        part = lora.merged(part.astype(jnp.float32), adapter)
    return part[0].T


def _leaf(params: dict, path: str) -> jax.Array:
    folder, _, name = path.rpartition("/")
    return (params[folder] if folder else params)[name]


def _write_shards(
    directory: pathlib.Path, tensors: dict[str, writer.Tensor], shard_bytes: int
) -> None:
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        writer.save_tensors({name: tensors[name] for name in names}, directory / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(directory / INDEX, index)


def _copy_companions(
    source: pathlib.Path, directory: pathlib.Path, patterns: Sequence[str], ending: Ending | None
) -> None:
    files = [file for pattern in patterns for file in source.glob(pattern)]
    files += [f for f in source.iterdir() if f.is_file() and _TERMS.fullmatch(f.name)]
    for file in files:
        target = directory / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    if ending is not None:
        _set_ending(directory / _GENERATION, ending)


def _set_ending(path: pathlib.Path, ending: Ending) -> None:
    """Keeps all other fields; a file with the same ending stays as it is, to the byte."""
    found = json_files.read_object(path) if path.exists() else {}
    fields = {"eos_token_id": None, "pad_token_id": None} | found
    stops = fields["eos_token_id"]
    if {*(stops if isinstance(stops, list) else [stops])} != {*ending.stop_ids}:
        fields["eos_token_id"] = list(ending.stop_ids)
    if fields["pad_token_id"] is None:
        fields["pad_token_id"] = ending.pad_id
    if fields != found:
        _write_json(path, fields)


def _write_json(path: pathlib.Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
