"""A training step and some text on meshes of eight devices; started by test_meshes.py.

    python mesh_steps.py OUT MESH ...

The meshes are 1x1x1, or some of eight devices, as 2x2x2. Writes OUT/MESH-WHAT.npz (sums,
gradients, text), .txt (the compiled step) and .json (its memory).
"""

import os
import sys

import compiling

os.environ["XLA_FLAGS"] = compiling.devices(8)

import json
import pathlib

import builders
import jax
import numpy as np
import optax

from gkdjax.config import Gkd, Train
from gkdjax.losses import top_k_logprobs
from gkdjax.losses.objective import DenseTargets, TopKTargets
from gkdjax.models.sampler import Keep, sample
from gkdjax.parallel.mesh import make_mesh, shard_rows
from gkdjax.parallel.sharding_rules import ShardingRules
from gkdjax.train.step import init_state, make_train_step
from gkdjax.types import SamplingParams
from gkdjax.utils.tree import path_str

V, D, L, K = 512, 32, 3, 4
MODEL = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "intermediate_size": 80}
MODEL |= {"layer_types": ["full_attention"] * L, "num_attention_heads": 8, "num_key_value_heads": 2}
BATCH = builders.batch((6, 2, 1, 5, 6, 3, 1, 4), vocab=V)
CASES = ("lora", "full")  # the one has a dense teacher, the other the best K tokens
RATE = 2.0**10  # so large that what the parameters were is lost in it, and the gradient is not


def main(out: str, *meshes: str) -> None:
    for name in meshes:
        sizes = [int(size) for size in name.split("x")]
        mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
        decoder, params = builders.small_model(**MODEL)
        params = jax.tree.map(np.array, params)  # the step takes its state for itself
        layout = ShardingRules.of(mesh, decoder.spec)
        decoder = decoder.clone(layout=layout)
        path = pathlib.Path(out, name)
        for case in CASES:
            _step(decoder, params, case == "lora", mesh, f"{path}-{case}")
        _text(decoder, jax.device_put(params, layout.shardings_of(params)), mesh, f"{path}-text")


def _step(decoder, params, adapted: bool, mesh, name: str) -> None:
    """One step of plain gradient descent: what changes is the gradient."""
    optimizer, layout = optax.sgd(RATE), decoder.layout
    kind = "mixed" if adapted else "generalized_jsd"
    config = builders.config(gkd=Gkd(kind, jsd_beta=0.3, chunk_size=8), train=Train())
    step = make_train_step(decoder, optimizer, optax.constant_schedule(1.0), config, mesh)
    adapters = jax.tree.map(np.array, builders.adapters(decoder))
    frozen, trainable = (params, adapters) if adapted else (None, params)
    state = init_state(trainable, optimizer)
    places = layout.shardings_of(state), layout.shardings_of(frozen)
    state, frozen = jax.device_put((state, frozen), places)
    arguments = state, frozen, shard_rows(mesh, BATCH), _targets(layout, adapted), {}
    compiled = step.lower(*arguments, divergence=kind).compile()
    pathlib.Path(name + ".txt").write_text(compiled.as_text())
    new, sums = compiled(*arguments)
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(layout.shardings_of(new)), strict=True)
    moved = [str(place) for x, place in pairs if not x.sharding.is_equivalent_to(place, x.ndim)]
    memory = compiled.memory_analysis()
    found = {"arguments": memory.argument_size_in_bytes, "temp": memory.temp_size_in_bytes}
    pathlib.Path(name + ".json").write_text(json.dumps(found | {"moved": moved}))
    changed = jax.tree.map(np.subtract, trainable, jax.device_get(new.trainable))
    flat, _ = jax.tree_util.tree_flatten_with_path(changed)
    gradients = {path_str(path): leaf / RATE for path, leaf in flat}
    np.savez(name + ".npz", **gradients, **{f"sum:{k}": v for k, v in sums.items()})


def _targets(layout: ShardingRules, dense: bool):
    targets = builders.dense_targets(BATCH, vocab=V, width=16)
    if dense:
        hidden_BNE = shard_rows(layout.mesh, targets.hidden_BNE)
        place = layout.sharding_of("embedding", (V, 16))
        table_VE = jax.device_put(targets.unembedding_VE, place)
        return DenseTargets(hidden_BNE, table_VE, targets.softcap)
    topk = jax.jit(top_k_logprobs, static_argnums=1)(builders.teacher_logits(targets), K)
    return shard_rows(layout.mesh, TopKTargets(topk, topk.logprobs[..., 0]))


def _text(decoder, params, mesh, name: str) -> None:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, V, length).astype(np.int32) for length in (3, 5, 4, 7, 2, 3, 6, 4)]
    sampling = SamplingParams(max_new_tokens=6, temperature=0.9, top_p=0.8)
    how = {"stop_ids": (1, 2), "batch_size": 8, "lengths": (8,), "mesh": mesh, "keep": Keep(K, 1.0)}
    written = sample(decoder, params, prompts, range(8), sampling, **how)
    np.savez(
        name + ".npz",
        ids=np.concatenate([one.ids for one in written]),
        top_ids=np.concatenate([one.cached.topk.ids for one in written]),
        logprobs=np.concatenate([one.cached.topk.logprobs for one in written]),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
