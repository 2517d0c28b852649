"""The planner's programs beside XLA's own account of them: compiled on a CPU, never run.

    JAX_PLATFORMS=cpu python -m gkdjax.benchmarks.planned_memory

Random models of Gemma's kind, as shapes alone; float32, as XLA's CPU backend computes bfloat16 in
it. Meshes are of up to eight CPU devices; the account is of one of them.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gkdjax import config
from gkdjax.benchmarks.models import STUDENTS, TEACHERS, abstract_batch, decoder_spec
from gkdjax.losses import TopKLogprobs
from gkdjax.losses.objective import DenseTargets, TeacherTargets, TopKTargets
from gkdjax.models.decoder import Decoder, abstract_params, unembedding_table
from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.prefix_cache import predicting_hidden
from gkdjax.parallel.mesh import ROWS, make_mesh
from gkdjax.parallel.sharding_rules import ShardingRules
from gkdjax.train import optimizer as train_optimizer
from gkdjax.train.planning import memory
from gkdjax.train.planning.activations import adapters
from gkdjax.train.planning.setup import PlanInputs, Weights, mesh_of
from gkdjax.train.step import init_state, make_train_step
from gkdjax.types import Batch
from gkdjax.utils.text import size, table


class Case(NamedTuple):
    """A config and models that are planned and compiled."""

    name: str
    vocab: int  # of both models
    changes: dict  # of the config, by key
    mesh: tuple[int, int, int] = (1, 1, 1)  # data, fsdp, tensor


_ROWS = {"train.batch_size": 4, "data.max_length": 256}
_FULL = {"student.adapter": "none"}
_LONG = _ROWS | {"data.max_length": 1024, "train.remat": True}
_TOP = {"data.max_length": 128, "teacher.top_k": 64, "train.grad_accum_steps": 2}
_LARGE = _ROWS | _FULL | {"train.remat": True, "gkd.chunk_size": 64}
_ANCHOR = {"anchor.data": ({"prompt": "?"},), "anchor.batch_size": 16, "teacher.top_k": 64}
_ANCHOR |= {"train.batch_size": 16, "data.max_length": 64}
CASES = (
    Case("LoRA, dense", 4096, _ROWS),
    Case("LoRA, dense, remat, long rows", 4096, _LONG),
    Case("full, top k, accumulation", 4096, _FULL | _TOP | {"train.batch_size": 8}),
    Case("full, dense, remat, large vocabulary, small chunk", 131_072, _LARGE),
    Case("LoRA, top k, anchor, short rows", 32_768, _ANCHOR),
)
_REMAT = {"train.batch_size": 16, "data.max_length": 512, "train.remat": True}
_PARTS = _FULL | _TOP | {"train.batch_size": 32}
SHARDED = (
    Case("LoRA, dense", 4096, _ROWS | {"train.batch_size": 8}, (1, 8, 1)),
    Case("LoRA, dense, remat", 4096, _REMAT, (2, 2, 2)),
    Case("full, top k, accumulation", 4096, _PARTS, (1, 1, 8)),
    Case("LoRA, dense, remat", 4096, _REMAT, (1, 1, 8)),
    Case("full, top k, accumulation", 4096, _PARTS, (1, 8, 1)),
    Case("LoRA, dense, remat", 4096, _REMAT, (1, 8, 1)),
    Case("full, dense, large vocabulary", 131_072, _FULL | _ROWS, (1, 2, 4)),
)
READINGS = ((8, 256), (4, 1024), (32, 64))  # rows, positions: of the teacher's forward pass


def main() -> None:
    jax.config.update("jax_num_cpu_devices", max(math.prod(case.mesh) for case in SHARDED))
    found = {
        f"step, {'x'.join(map(str, case.mesh))}: {case.name}": compare(case)
        for case in CASES + SHARDED
    }
    for rows, length in READINGS:
        found[f"teacher's forward pass, {rows} x {length:,}"] = compare_reading(rows, length)
    cells = [
        [name, size(planned), size(measured), f"{planned / measured - 1:+.1%}"]
        for name, (planned, measured) in found.items()
    ]
    print(table(["program", "planned", "XLA", "difference"], cells, widest=70))


def compare(case: Case) -> tuple[int, int]:
    """(bytes that the planner has, bytes that XLA has) of the training step and its arguments."""
    setup = setup_of(case)
    planned = memory.total(memory.training_step(setup))
    planned += sum(n for part, n in memory.held(setup).items() if not part.startswith("teacher"))
    c, (student, teacher) = setup.config, (setup.student.spec, setup.teacher.spec)
    if c.teacher.top_k is None:  # all that the step reads of the teacher
        table = jax.ShapeDtypeStruct((teacher.vocab_size, teacher.width), jnp.float32)
        planned += setup.of_teacher.held_of({"unembedding": table}) * 4
    mesh = make_mesh(*case.mesh, devices=jax.devices()[: setup.mesh.size])
    batch, anchor = (
        abstract_batch(rows, *[c.data.max_length] * 3)
        for rows in (c.train.batch_size, c.anchor.batch_size)
    )
    anchor = None if c.anchor.data is None else anchor
    found = compiled_step(c, student, teacher, mesh, batch, anchor).memory_analysis()
    measured = found.argument_size_in_bytes + found.temp_size_in_bytes
    return planned, measured + found.output_size_in_bytes - found.alias_size_in_bytes


def compare_reading(rows: int, length: int) -> tuple[int, int]:
    """(bytes that the planner has, bytes that XLA has) of what a forward pass needs for itself."""
    setup = setup_of(Case("", 4096, {"train.batch_size": rows, "data.max_length": length}))
    program = compiled_forward(setup.teacher.spec, abstract_batch(rows, *[length] * 3))
    planned = memory.teacher_forward(setup)["one layer's pass"]
    return planned, program.memory_analysis().temp_size_in_bytes


def setup_of(case: Case) -> PlanInputs:
    """The defaults with the case's changes, whose files are never read, and float32 models.

    On several devices these have eight heads, and as many keys and values.
    """
    c = config.default()
    c.student.model = c.teacher.model = "none"
    c.teacher.backend, c.data.train = "flax", "none.jsonl"
    c.context.prefix_messages = ({"role": "system", "content": "?"},)
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = case.mesh
    c.eval.batch_size = 8
    c.update_from_flattened_dict(case.changes)
    c, devices = config.parse(c), math.prod(case.mesh)
    specs = [decoder_spec(of["small"], case.vocab) for of in (STUDENTS, TEACHERS)]
    if devices > 1:
        specs = [dataclasses.replace(spec, num_heads=8, num_kv_heads=8) for spec in specs]
    weights = (Weights.of(spec, "float32") for spec in specs)
    return PlanInputs(c, *weights, False, mesh_of(c, devices))


def compiled_step(
    c: config.Config,
    student: DecoderConfig,
    teacher: DecoderConfig,
    mesh: Mesh,
    batch: Batch,
    anchor: Batch | None,
    dtype=jnp.float32,
) -> jax.stages.Compiled:
    """The optimizer step on the mesh for such batches; `dtype` is of weights and products."""
    layouts = [ShardingRules.of(mesh, spec) for spec in (student, teacher)]
    base, teacher_params = (
        _placed(abstract_params(spec, dtype), layout.shardings_of(abstract_params(spec, dtype)))
        for layout, spec in zip(layouts, (student, teacher), strict=True)
    )
    full = c.student.adapter == "none"
    trainable = base if full else adapters(student, str(jnp.dtype(dtype)), c.student.lora)
    optimizer = train_optimizer.optimizer(c.optim, c.train.steps or 1)
    state = jax.eval_shape(lambda trainable: init_state(trainable, optimizer), trainable)
    state = _placed(state, layouts[0].shardings_of(state))
    how = {"param_dtype": dtype, "compute_dtype": dtype, "remat": c.train.remat}
    decoder = Decoder(student, layout=layouts[0], **how)
    step = make_train_step(decoder, optimizer, train_optimizer.schedule(c.optim, 1), c, mesh)

    def part(batch: Batch, spec: DecoderConfig, params: dict) -> tuple[Batch, TeacherTargets]:
        targets = _targets(c, spec, params, batch, dtype)
        rows = NamedSharding(mesh, ROWS)
        batch = _placed(batch, jax.tree.map(lambda _: rows, batch))
        return batch, _placed(targets, jax.tree.map(lambda x: x.sharding or rows, targets))

    anchors = {} if anchor is None else {"anchor": part(anchor, student, base)}
    arguments = state, None if full else base, *part(batch, teacher, teacher_params), anchors
    return step.lower(*arguments, divergence=c.gkd.divergence).compile()


def compiled_forward(spec: DecoderConfig, batch: Batch, dtype=jnp.float32) -> jax.stages.Compiled:
    """The forward pass of a teacher over its view of such a batch, on one device."""
    decoder = Decoder(spec, param_dtype=dtype, compute_dtype=dtype)
    view = batch.teacher_tokens_BT, batch.teacher_mask_BT, batch.teacher_at_BN
    return predicting_hidden.lower(decoder, abstract_params(spec, dtype), *view).compile()


def _placed(leaves, places):
    """Shapes that say where they lie."""

    def placed(x, place):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(placed, leaves, places)


def _targets(
    c: config.Config, spec: DecoderConfig, params: dict, batch: Batch, dtype
) -> TeacherTargets:
    def each(*last, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((*batch.target_mask_BN.shape, *last), dtype)

    k = c.teacher.top_k
    if k is None:
        hidden_BNE = each(spec.width, dtype=dtype)
        return DenseTargets(hidden_BNE, unembedding_table(spec, params), spec.final_softcap)
    topk = TopKLogprobs(each(k, dtype=jnp.int32), each(k), each(), c.gkd.temperature)
    return TopKTargets(topk, each())


if __name__ == "__main__":
    main()
