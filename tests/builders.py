"""Small random models, adapters and batches for the tests, without a file and without torch's help.

Everything is NumPy on the way in, so that no program is compiled just to make a test's input.
"""

import dataclasses

import factories
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gkdjax.config import Config, Train
from gkdjax.losses.lm_head import unembed
from gkdjax.losses.objective import DenseTargets
from gkdjax.models.decoder import Decoder
from gkdjax.models.decoder_config import layer_shapes, param_shapes
from gkdjax.models.lora import Adapter
from gkdjax.types import Batch

GLOBAL = "full_attention"
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "layer_types": [GLOBAL, GLOBAL],  # one kind of attention compiles faster than two
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
}


def small_model(seed: int = 0, **overrides) -> tuple[Decoder, dict]:
    """(decoder, float32 params) of random weights; logits have a standard deviation of about 1."""
    spec = factories.spec(**(SMALL | overrides))
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, shape in param_shapes(spec).items():
        if path.endswith("norm"):
            std = 0.3
        else:
            std = (shape[-2] if path.startswith("layers/") else shape[-1]) ** -0.5
        leaves[path] = jnp.asarray(std * rng.standard_normal(shape), jnp.float32)
    return Decoder(spec), traverse_util.unflatten_dict(leaves, sep="/")


def adapters(decoder: Decoder, seed: int = 1, rank: int = 2, dropout: float = 0.0, names=None):
    """Adapters as after some training: both halves random, so that both get a gradient."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in layer_shapes(decoder.spec).items():
        if not name.endswith("_proj") or (names is not None and name not in names):
            continue
        L, fan_in, fan_out = shape
        made[f"layers/{name}"] = Adapter(
            a=jnp.asarray(fan_in**-0.5 * rng.standard_normal((L, fan_in, rank)), jnp.float32),
            b=jnp.asarray(0.3 * rng.standard_normal((L, rank, fan_out)), jnp.float32),
            scale=1.5,
            dropout=dropout,
        )
    return made


def batch(
    targets_per_row: tuple[int, ...],
    *,
    prompt: int = 3,
    prefix: int = 2,
    length: int | None = None,
    vocab: int = 32,
    seed: int = 0,
) -> Batch:
    """Rows of `prompt` tokens and their targets; the teacher reads `prefix` more in front of them.

    Args:
      targets_per_row: the rows may differ in it; the rest is padding.
      length: of the student's padded view, the least that fits by default; the teacher's is
        `prefix` longer.
    """
    rng = np.random.default_rng(seed)
    most = max(targets_per_row)
    S = prompt + most if length is None else length
    rows, n = len(targets_per_row), np.asarray(targets_per_row)[:, None]
    own_BS = rng.integers(3, vocab, (rows, 64)).astype(np.int32)[:, :S]  # the same for every S
    prefix_BP = rng.integers(3, vocab, (rows, prefix)).astype(np.int32)
    student_mask_BS = np.arange(S)[None, :] < prompt + n
    mask_BN = np.arange(most)[None, :] < n
    at_BN = np.where(mask_BN, prompt - 1 + np.arange(most)[None, :], 0).astype(np.int32)
    target_ids_BN = np.where(mask_BN, own_BS[:, prompt : prompt + most], 0).astype(np.int32)
    return Batch(
        student_tokens_BS=np.where(student_mask_BS, own_BS, 0).astype(np.int32),
        student_mask_BS=student_mask_BS,
        student_at_BN=at_BN,
        teacher_tokens_BT=np.concatenate([prefix_BP, np.where(student_mask_BS, own_BS, 0)], 1),
        teacher_mask_BT=np.concatenate([np.ones((rows, prefix), bool), student_mask_BS], 1),
        teacher_at_BN=np.where(mask_BN, at_BN + prefix, 0).astype(np.int32),
        target_ids_BN=target_ids_BN,
        target_mask_BN=mask_BN,
        row_id_B=np.arange(rows, dtype=np.int32),
    )


def dense_targets(like: Batch, vocab: int = 32, width: int = 6, seed: int = 5) -> DenseTargets:
    """A teacher that is no model: random hidden states and unembedding."""
    rng = np.random.default_rng(seed)
    hidden_BNE = rng.standard_normal((*like.target_mask_BN.shape, width))
    table_VE = rng.standard_normal((vocab, width))
    return DenseTargets(
        jnp.asarray(hidden_BNE, jnp.float32), jnp.asarray(table_VE, jnp.float32), None
    )


def config(**sections) -> Config:
    """`Config` with whole sections replaced, as config(gkd=Gkd(divergence="reverse_kl"))."""
    return dataclasses.replace(Config(), **({"train": Train()} | sections))


def logits(hidden_BND, table_VD, softcap: float | None):
    """[B,N,V] at once, as nothing but a test holds them."""
    return unembed(jnp.asarray(hidden_BND), jnp.asarray(table_VD), softcap)


def teacher_logits(targets: DenseTargets):
    """[B,N,V] of dense targets."""
    return logits(targets.hidden_BNE, targets.unembedding_VE, targets.softcap)
