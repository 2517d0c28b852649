"""What the devices of a step tell each other: sums and gradients, never tokens or logits."""

import dataclasses
import re

import builders
import optax
import pytest

from gkdjax.config import Gkd, Train
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.train.step import init_state, make_train_step

BATCH = builders.batch((2, 2, 1, 2, 2, 2, 1, 2))


@pytest.mark.parametrize("full", [False, True])
def test_sums_and_gradients_are_all_that_is_exchanged(full):
    mesh, optimizer = parallel_mesh.make_mesh(), optax.sgd(1.0)
    assert mesh.size == 4
    decoder, params = builders.small_model()
    config = builders.config(gkd=Gkd("forward_kl"), train=Train(grad_accum_steps=2))
    step = make_train_step(decoder, optimizer, optax.constant_schedule(0.1), config, mesh)
    frozen, trainable = (None, params) if full else (params, builders.adapters(decoder))
    whole = parallel_mesh.replicate(mesh, (init_state(trainable, optimizer), frozen))
    targets = builders.dense_targets(BATCH)
    targets = dataclasses.replace(
        targets,
        hidden_BNE=parallel_mesh.shard_rows(mesh, targets.hidden_BNE),
        unembedding_VE=parallel_mesh.replicate(mesh, targets.unembedding_VE),
    )
    batch = parallel_mesh.shard_rows(mesh, BATCH)
    lowered = step.lower(*whole, batch, targets, {}, divergence="forward_kl")
    text = lowered.compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    assert set(re.findall(rf" ({kinds})(?:-start)?\(", text)) == {"all-reduce"}
