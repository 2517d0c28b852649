"""A training step and some text on meshes of eight devices; started by test_meshes.py.

    python mesh_steps.py OUT MESH ...

The meshes are 1x1x1, or some of eight devices, as 2x2x2. Writes OUT/MESH-WHAT.npz (sums,
gradients, text), .txt (the compiled step) and .json (its memory).
"""

import os
import sys

import compiling

os.environ["XLA_FLAGS"] = compiling.devices(8)

import dataclasses
import json
import pathlib

import builders
import jax
import numpy as np
import optax

from gkdjax.config import Gkd, Train
from gkdjax.losses import top_k_logprobs
from gkdjax.losses.objective import TopKTargets
from gkdjax.models.sampler import Keep, sample
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.parallel.sharding_rules import ShardingRules
from gkdjax.train.step import init_state, make_train_step
from gkdjax.types import SamplingParams
from gkdjax.utils.tree import path_str

V, D, L, K = 512, 32, 3, 4
MODEL = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "layer_types": ["full_attention"] * L,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
}
BATCH = builders.batch((6, 2, 1, 5, 6, 3, 1, 4), vocab=V)
CASES = ("lora", "full")  # the one has a dense teacher, the other the best K tokens
RATE = 2.0**10  # so large that what the parameters were is lost in it, and the gradient is not
SAMPLING = SamplingParams(max_new_tokens=6, temperature=0.9, top_p=0.8, top_k=None)


def main(out: str, *meshes: str) -> None:
    for name in meshes:
        sizes = [int(size) for size in name.split("x")]
        mesh = parallel_mesh.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
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
    state, frozen = jax.device_put(
        (state, frozen), (layout.shardings_of(state), layout.shardings_of(frozen))
    )
    arguments = state, frozen, parallel_mesh.shard_rows(mesh, BATCH), _targets(layout, adapted), {}
    compiled = step.lower(*arguments, divergence=kind).compile()
    memory = compiled.memory_analysis()
    found = {"arguments": memory.argument_size_in_bytes, "temp": memory.temp_size_in_bytes}
    pathlib.Path(name + ".txt").write_text(compiled.as_text())
    new, sums = compiled(*arguments)
    leaves, _ = jax.tree_util.tree_flatten_with_path(new)
    found["moved"] = [
        path_str(path)
        for (path, leaf), place in zip(
            leaves, jax.tree.leaves(layout.shardings_of(new)), strict=True
        )
        if not leaf.sharding.is_equivalent_to(place, leaf.ndim)
    ]
    pathlib.Path(name + ".json").write_text(json.dumps(found))
    changed = jax.tree.map(np.subtract, trainable, jax.device_get(new.trainable))
    flat, _ = jax.tree_util.tree_flatten_with_path(changed)
    gradients = {path_str(path): leaf / RATE for path, leaf in flat}
    np.savez(name + ".npz", **gradients, **{f"sum:{k}": v for k, v in sums.items()})


def _targets(layout: ShardingRules, dense: bool):
    targets = builders.dense_targets(BATCH, vocab=V, width=16)
    if dense:
        return dataclasses.replace(
            targets,
            hidden_BNE=parallel_mesh.shard_rows(layout.mesh, targets.hidden_BNE),
            unembedding_VE=jax.device_put(
                targets.unembedding_VE, layout.sharding_of("embedding", (V, 16))
            ),
        )
    topk = jax.jit(top_k_logprobs, static_argnums=1)(builders.teacher_logits(targets), K)
    return parallel_mesh.shard_rows(layout.mesh, TopKTargets(topk, topk.logprobs[..., 0]))


def _text(decoder, params, mesh, name: str) -> None:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, V, length).astype(np.int32) for length in (3, 5, 4, 7, 2, 3, 6, 4)]
    written = sample(
        decoder,
        params,
        prompts,
        range(8),
        SAMPLING,
        stop_ids=(1, 2),
        batch_size=8,
        lengths=(8,),
        mesh=mesh,
        keep=Keep(K, 1.0),
    )
    kept = [one.kept for one in written]
    np.savez(
        name + ".npz",
        ids=np.concatenate([one.ids for one in written]),
        top_ids=np.concatenate([each.topk.ids for each in kept]),
        logprobs=np.concatenate([each.topk.logprobs for each in kept]),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
