"""What a run hands over: a Hugging Face model directory, a PEFT adapter directory, or both."""

import json
import pathlib
import shutil

import jax
import numpy as np

from gkdjax import hf, lora
from gkdjax.models.spec import DecoderSpec


def export_merged(
    directory: pathlib.Path, spec: DecoderSpec, params: dict, adapters: dict | None, source: str
) -> None:
    """A model directory, in the dtype of `source`, that transformers loads as it is.

    Args:
      directory: replaced as a whole.
      spec: the student's.
      params: the frozen base, or all trained parameters.
      adapters: to be merged into the base; None where there are none.
      source: the model directory that the student came from.
    """
    merged = params if adapters is None else lora.merge(params, adapters)
    dtype = hf.stored_dtype(source)
    hf.save_pretrained(directory, spec, jax.tree.map(lambda x: x.astype(dtype), merged), source)


def export_adapter(
    directory: pathlib.Path, spec: DecoderSpec, adapters: dict, config, source: str
) -> None:
    """A directory that `peft.PeftModel.from_pretrained` loads: float32 A (r, in) and B (out, r).

    Args:
      directory: replaced as a whole.
      spec: the student's.
      adapters: from training.
      config: `config.Lora`.
      source: the base's model directory, named in adapter_config.json.
    """
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tensors = {}
    for path, adapter in adapters.items():
        for layer in range(spec.num_layers):
            name = hf.tensor_name(spec, path, layer).removesuffix(".weight")
            for half, stacked in (("lora_A", adapter.a), ("lora_B", adapter.b)):
                matrix = np.asarray(jax.device_get(stacked[layer]), np.float32).T
                tensors[f"base_model.model.{name}.{half}.weight"] = np.ascontiguousarray(matrix)
    hf.save_tensors(tensors, part / "adapter_model.safetensors")
    (part / "adapter_config.json").write_text(
        json.dumps(_peft_config(adapters, config, source), indent=2) + "\n"
    )
    shutil.rmtree(directory, ignore_errors=True)
    part.rename(directory)


def _peft_config(adapters: dict, config, source: str) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(pathlib.Path(source).absolute()),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(path.removeprefix("layers/") for path in adapters),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
