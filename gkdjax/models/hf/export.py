"""What a run hands over: a Hugging Face model directory, a PEFT adapter directory, or both.

Tensors are made one at a time: a model in training is not held twice. Of several processes all
make them, because each has a part, and the leader writes them.
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

SHARD_BYTES = 5 * 10**9  # what the hub recommends, and transformers writes

ENDING = "ending.json"  # `Ending` in a run's directory
_GENERATION = "generation_config.json"
# The tokenizer with its chat template, and how text is generated: beside an adapter too.
_TEXT_COMPANIONS = (
    _GENERATION,
    *("tokenizer*.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
# Everything beside the weights that a model directory needs to stay usable after training.
_COMPANIONS = (
    "config.json",
    *_TEXT_COMPANIONS,
    *("preprocessor_config.json", "processor_config.json"),
)

# The terms on which the source may be passed on: Llama's USE_POLICY.md, say.
_TERMS = re.compile(
    r"[\w .-]*(licen[cs]e|use[_ -]?policy|notice|terms[_ -]of[_ -]use|copying)[\w -]*"
    r"([.]\d+)*([.](txt|md|rst))?",
    re.IGNORECASE,
)


class Ending(NamedTuple):
    """What ends a response of the student in its run, for generation_config.json."""

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
    """A model directory with the source's tensor names and dtypes, as transformers loads it.

    What is no part of the text decoder, an image encoder, is copied from the source.

    Args:
      directory: replaced as a whole, see `writer.whole_directory`; it may be the source.
      spec: the student's.
      params: the frozen base, or all trained parameters.
      adapters: to be merged into the base; None where there are none.
      source: the directory of the model that the student came from.
      shard_bytes: most bytes of a file; more make several, with an index.
      ending: generation_config.json stops there; None: where the source's stops.

    Raises:
      UserError: the source is gone or changed, or a number does not fit the source's float16.
    """
    root = pathlib.Path(source)
    files = TensorFiles(root)
    _, known = load.source_names(files, spec, load_config(root)["model_type"])
    tensors = {}
    tables = tuple(files.dtype(n) for n, (path, _) in known.items() if path == "embedding")
    for name in files.names:
        dtype = files.dtype(name)
        make = functools.partial(files.read, name)
        if name in known:
            # A tied head of another dtype stays the embedding: both are rounded to both dtypes.
            by_way_of = tables if known[name][0] == "embedding" else ()
            make = functools.partial(
                _of_leaf, params, adapters, name, *known[name], dtype, by_way_of
            )
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
    """A directory that `peft.PeftModel.from_pretrained` loads: float32 A (r, in) and B (out, r).

    The tokenizer, its chat template and generation_config.json lie beside them. PEFT takes the
    base's own generation_config.json, so whoever generates passes this one. The source's licence
    files come along.

    Args:
      directory: replaced as a whole, see `writer.whole_directory`.
      spec: the student's.
      adapters: from training.
      source: the directory of the base.
      base: what adapter_config.json calls the base; None: the absolute path of `source`.
      ending: as for `export_merged`.
    """
    model_type = load_config(source)["model_type"]
    base = str(pathlib.Path(source).absolute()) if base is None else base
    with writer.whole_directory(directory) as part:
        _copy_companions(pathlib.Path(source), part, _TEXT_COMPANIONS, ending)
        peft.save_adapter(part, spec, adapters, model_type, base)


def save_pretrained(
    directory: str | pathlib.Path, spec: DecoderConfig, params: dict, source: str | pathlib.Path
) -> None:
    """A model directory of new weights, in the family's plain layout and the dtypes of `params`.

    Args:
      directory: replaced as a whole, see `writer.whole_directory`; it may be the source.
      spec: the decoder's.
      params: all of its parameters.
      source: a directory with its config.json, tokenizer and chat template.
    """
    tensors = {}
    for path, names in load.leaf_names(spec, CheckpointNames()).items():
        leaf = _leaf(params, path)
        for i, name in enumerate(names):
            layer = i if path.startswith("layers/") else None
            shape = leaf.shape if layer is None else leaf.shape[:0:-1]
            make = functools.partial(_of_leaf, params, None, name, path, layer, leaf.dtype)
            tensors[name] = writer.Tensor(leaf.dtype, shape, make)
    with writer.whole_directory(directory) as part:
        _copy_companions(pathlib.Path(source), part, _COMPANIONS, None)
        _set_dtype(part / "config.json", str(params["embedding"].dtype))
        _write_shards(part, tensors, SHARD_BYTES)


def _of_leaf(
    params: dict,
    adapters: dict[str, lora.Adapter] | None,
    name: str,
    path: str,
    layer: int | None,
    dtype: np.dtype,
    by_way_of: tuple[np.dtype, ...] = (),
) -> np.ndarray:
    """The tensor `name` that a checkpoint has of a leaf, or of one layer of a stacked one."""
    leaf = _leaf(params, path)
    if layer is not None:
        leaf = _layer(path, leaf, (adapters or {}).get(path), layer)
    with np.errstate(over="ignore"):  # told below, with a name
        tensor = np.asarray(mesh.fetch(leaf))
        for kind in (*by_way_of, dtype):
            tensor = tensor.astype(kind, copy=False)
    if dtype == np.float16 and not np.isfinite(tensor).all():
        raise UserError(
            f"{name} holds numbers beyond 65504, the most that float16, the source's dtype, can"
            " hold; start from a bfloat16 or float32 copy of the source"
        )
    return tensor


def _layer(path: str, leaf: jax.Array, adapter: lora.Adapter | None, layer: int) -> jax.Array:
    """One layer of a stacked leaf, its adapter merged; a kernel is (out, in), as HF has it."""

    def cut(stacked):
        if isinstance(stacked, np.ndarray):  # jax would take the whole of it to the device
            return stacked[layer : layer + 1]
        return jax.lax.dynamic_slice_in_dim(stacked, layer, 1)

    part = cut(leaf)
    if adapter is not None:
        name = path.removeprefix("layers/")
        one = dataclasses.replace(adapter, a=cut(adapter.a), b=cut(adapter.b))
        # In float32, so that the sum is rounded once, to the dtype of the file.
        merged = lora.merge({"layers": {name: part.astype(jnp.float32)}}, {path: one})
        part = merged["layers"][name]
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
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _copy_companions(
    source: pathlib.Path,
    directory: pathlib.Path,
    patterns: Sequence[str],
    ending: Ending | None,
) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            target = directory / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    _copy_terms(source, directory)
    if ending is not None:
        _set_ending(directory / _GENERATION, ending)


def _set_ending(path: pathlib.Path, ending: Ending) -> None:
    """Every other field stays, and so does a file that says it already, to the byte."""
    found = json_files.read_object(path) if path.exists() else {}
    fields = {"eos_token_id": None, "pad_token_id": None} | found
    stops = fields["eos_token_id"]
    if {*(stops if isinstance(stops, list) else [stops])} != {*ending.stop_ids}:
        fields["eos_token_id"] = list(ending.stop_ids)
    if fields["pad_token_id"] is None:
        fields["pad_token_id"] = ending.pad_id
    if fields != found:
        path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _copy_terms(source: pathlib.Path, directory: pathlib.Path) -> None:
    for file in source.iterdir():
        if file.is_file() and _TERMS.fullmatch(file.name):
            shutil.copyfile(file, directory / file.name)


def _set_dtype(path: pathlib.Path, dtype: str) -> None:
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)  # the name that older files use
    path.write_text(json.dumps(config | {"dtype": dtype}, indent=2, sort_keys=True) + "\n")
