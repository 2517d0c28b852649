"""Shared by the decoder's tests: rows, logits from both sides, and their distance."""

import functools

import factories
import jax
import numpy as np
import pytest
import torch

from gkdjax.models.hf import load

TOLERANCE = 2e-5  # on logits with a standard deviation of about 1
GLOBAL, LOCAL = "full_attention", "sliding_attention"
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 7,
    "layer_types": [GLOBAL, LOCAL, LOCAL],
    "max_window_layers": 1,
}


def pair(directory, family: str = "gemma3", **overrides):
    """(torch model, decoder, params) of the same weights, ours by way of `directory`."""
    path = factories.model_dir(directory, family=family, **overrides)
    return factories.torch_model(family=family, **overrides), *load.load_pretrained(path)


def pairs_of(cases: dict[str, tuple[str, dict]]):
    """A fixture load(name) -> `pair` of that case, made once a module."""

    @pytest.fixture(scope="module")
    def load(tmp_path_factory):
        @functools.cache
        def models(name):
            family, overrides = cases[name]
            return pair(tmp_path_factory.mktemp("model"), family, **overrides)

        return models

    return load


def rows(length: int, lengths: tuple[int, ...], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Random ids and the mask of rows of `lengths` real tokens, padded on `side`."""
    tokens_BT = np.random.default_rng(0).integers(3, factories.VOCAB_SIZE, (len(lengths), length))
    at = np.arange(length)
    real = [at >= length - n if side == "left" else at < n for n in lengths]
    return tokens_BT.astype(np.int32), np.stack(real)


def torch_logits(model, tokens_BT, mask_BT) -> np.ndarray:
    with torch.no_grad():
        out = model(torch.tensor(tokens_BT).long(), attention_mask=torch.tensor(mask_BT).long())
    return out.logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def _logits(decoder, params, tokens_BT, mask_BT, prefix):
    hidden_BTD = decoder.apply({"params": params}, tokens_BT, mask_BT, prefix)
    return decoder.apply({"params": params}, hidden_BTD, method="unembed")


def decoder_logits(decoder, params, tokens_BT, mask_BT, prefix=None) -> np.ndarray:
    return np.asarray(_logits(decoder, params, tokens_BT, mask_BT, prefix))


def distance(got_BTV, wanted_BTV, mask_BT) -> float:
    return float(np.abs(got_BTV - wanted_BTV)[mask_BT].max())
