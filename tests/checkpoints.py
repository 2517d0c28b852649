"""Tiny checkpoints of every family and of the multimodal layout, with torch as the oracle."""

import functools
import pathlib

import factories
import jax
import numpy as np
import safetensors.torch
import torch
import transformers

MULTIMODAL = "gemma3-multimodal"
KINDS = (*factories.FAMILIES, MULTIMODAL)
TOKENS_BT = np.random.default_rng(0).integers(3, 90, (2, 12)).astype(np.int32)

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_MADE_BY_PROCESSOR = ("preprocessor_config.json", "processor_config.json")


def make(
    directory: pathlib.Path,
    kind: str,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    **overrides,
) -> str:
    """Writes weights, config, tokenizer and all that goes with them -> the directory's path."""
    model = _multimodal() if kind == MULTIMODAL else factories.torch_model(family=kind, **overrides)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    factories.tokenizer().save_pretrained(directory)
    if kind == MULTIMODAL:
        for name in _MADE_BY_PROCESSOR:
            (directory / name).write_text(f'{{"made by": "{name}"}}')
    return str(directory)


def _multimodal():
    text = factories.config().to_dict()
    fields = {"text_config": text, "vision_config": _VISION, "mm_tokens_per_image": 4}
    fields |= {"image_token_index": 100, "boi_token_index": 101, "eoi_token_index": 102}
    config = transformers.Gemma3Config(**fields, tie_word_embeddings=True)
    model = transformers.Gemma3ForConditionalGeneration(config)
    factories.randomise(model, seed=0)
    return model.eval()


def tensors(directory: str | pathlib.Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory's files, as torch reads them."""
    found = {}
    for file in sorted(pathlib.Path(directory).glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return found


def assert_same_bytes(directory: str | pathlib.Path, other: str | pathlib.Path) -> None:
    """The same tensor names, and for each the same dtype, shape and bytes."""
    got, wanted = tensors(directory), tensors(other)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


def load_torch(directory: str | pathlib.Path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def torch_logits(model) -> np.ndarray:
    """[B,T,V] of `TOKENS_BT`."""
    with torch.no_grad():
        return model(torch.tensor(TOKENS_BT).long()).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def logits(decoder, params):
    """[B,T,V] of `TOKENS_BT`."""
    hidden = decoder.apply({"params": params}, TOKENS_BT, TOKENS_BT >= 0)
    return decoder.apply({"params": params}, hidden, method="unembed")
