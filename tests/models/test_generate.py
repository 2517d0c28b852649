"""Greedy text of every family against `transformers.generate`."""

import factories
import numpy as np
import pytest
import torch

from gkdjax.models.sampler import sample
from gkdjax.types import SamplingParams
from tests.models.model_cases import pair

N = 64  # far past the window of 5
LENGTHS = (9, 4, 1, 6)
PROMPTS = [
    np.random.default_rng(i).integers(3, 120, n).astype(np.int32) for i, n in enumerate(LENGTHS)
]
CASES = {
    "gemma3": {"rope_parameters": factories.rope_parameters(8.0)},
    "qwen3": {},
    "qwen2": {},
    "llama": {"rope_parameters": factories.LLAMA3_ROPE},
}


def generated(model, prompts) -> np.ndarray:
    P = max(map(len, prompts))
    tokens_BP = np.stack([np.pad(ids, (P - len(ids), 0)) for ids in prompts])
    mask_BP = np.stack([np.arange(P) >= P - len(ids) for ids in prompts])
    out = model.generate(
        torch.tensor(tokens_BP).long(),
        attention_mask=torch.tensor(mask_BP).long(),
        do_sample=False,
        max_new_tokens=N,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[:, P:].numpy()


@pytest.mark.parametrize("family", CASES)
def test_greedy_text_equals_torchs(family, tmp_path):
    # Tied random models say one thing over and over.
    model, decoder, params = pair(tmp_path, family, tie_word_embeddings=False, **CASES[family])
    got = sample(
        decoder,
        params,
        PROMPTS,
        range(len(PROMPTS)),
        SamplingParams(N, temperature=0.0, top_p=1.0),
        stop_ids=(-1,),
        batch_size=len(PROMPTS),
        lengths=(12,),
    )
    wanted = generated(model, PROMPTS)
    assert min(len(set(row)) for row in wanted.tolist()) > 5  # it does not repeat itself
    np.testing.assert_array_equal([completion.ids for completion in got], wanted)
