"""The planner's programs beside XLA's own account of them: compiled on a CPU, never run.

    JAX_PLATFORMS=cpu python -m gkdjax.benchmarks.planned_memory

Random models of Gemma's kind, as shapes alone; float32, as XLA's CPU backend computes bfloat16 in
it. Meshes are of up to eight CPU devices; the account is of one of them.
"""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gkdjax import config
from gkdjax.benchmarks.case import STUDENTS, TEACHERS, decoder_spec
from gkdjax.losses import TopKLogprobs
from gkdjax.losses.objective import DenseTargets, TeacherTargets, TopKTargets
from gkdjax.models.decoder import Decoder, abstract_params, unembedding_table
from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.prefix_cache import predicting_hidden
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.parallel.sharding_rules import ShardingRules
from gkdjax.train import optimizer as train_optimizer
from gkdjax.train.planning import memory
from gkdjax.train.planning.activations import adapters
from gkdjax.train.planning.setup import PlanInputs, Weights, mesh_of
from gkdjax.train.step import init_state, make_train_step
from gkdjax.types import Batch
from gkdjax.utils.text import size, table


class Case(typing.NamedTuple):
    """What is planned and compiled."""

    name: str
    vocab: int  # of both models
    changes: dict  # of the config, by key
    mesh: tuple[int, int, int] = (1, 1, 1)  # data, fsdp, tensor


_ROWS = {"train.batch_size": 4, "data.max_length": 256}
_FULL = {"student.adapter": "none"}
_ANCHOR = {"anchor.data": ({"prompt": "?"},), "anchor.batch_size": 16}
CASES = (
    Case("LoRA, dense", 4096, _ROWS),
    Case(
        "LoRA, dense, remat, long rows",
        4096,
        _ROWS | {"data.max_length": 1024, "train.remat": True},
    ),
    Case(
        "full, top k, accumulation",
        4096,
        _FULL
        | {"train.batch_size": 8, "train.grad_accum_steps": 2}
        | {"data.max_length": 128, "teacher.top_k": 64},
    ),
    Case(
        "full, dense, remat, large vocabulary, small chunk",
        131_072,
        _ROWS | _FULL | {"train.remat": True, "gkd.chunk_size": 64},
    ),
    Case(
        "LoRA, top k, anchor, short rows",
        32_768,
        _ANCHOR | {"train.batch_size": 16, "data.max_length": 64, "teacher.top_k": 64},
    ),
)
_REMAT = {"train.batch_size": 16, "data.max_length": 512, "train.remat": True}
_PARTS = {"train.batch_size": 32, "train.grad_accum_steps": 2, "data.max_length": 128}
SHARDED = (
    Case("LoRA, dense", 4096, _ROWS | {"train.batch_size": 8}, (1, 8, 1)),
    Case("LoRA, dense, remat", 4096, _REMAT, (2, 2, 2)),
    Case("full, top k, accumulation", 4096, _FULL | _PARTS | {"teacher.top_k": 64}, (1, 1, 8)),
    Case("LoRA, dense, remat", 4096, _REMAT, (1, 1, 8)),
    Case("full, top k, accumulation", 4096, _FULL | _PARTS | {"teacher.top_k": 64}, (1, 8, 1)),
    Case("LoRA, dense, remat", 4096, _REMAT, (1, 8, 1)),
    Case("full, dense, large vocabulary", 131_072, _FULL | _ROWS, (1, 2, 4)),
)
READINGS = ((8, 256), (4, 1024), (32, 64))  # rows, positions: of the teacher's forward pass


def main() -> None:
    jax.config.update("jax_num_cpu_devices", max(math.prod(case.mesh) for case in SHARDED))
    rows = []
    for case in CASES + SHARDED:
        planned, measured = compare(case)
        mesh = "x".join(map(str, case.mesh))
        rows.append(_row(f"step, {mesh}: {case.name}", planned, measured))
    for rows_at_once, length in READINGS:
        planned, measured = compare_reading(rows_at_once, length)
        rows.append(_row(f"teacher's forward pass, {rows_at_once} x {length:,}", planned, measured))
    print(table(["program", "planned", "XLA", "difference"], rows, widest=70))


def _row(name: str, planned: int, measured: int) -> list[str]:
    return [name, size(planned), size(measured), f"{planned / measured - 1:+.1%}"]


def compare(case: Case) -> tuple[int, int]:
    """(bytes that the planner has, bytes that XLA has) of the training step and its arguments."""
    setup = setup_of(case)
    planned = memory.total(memory.training_step(setup))
    planned += sum(n for part, n in memory.held(setup).items() if not part.startswith("teacher"))
    if setup.config.teacher.top_k is None:  # all that the step reads of the teacher
        teacher = setup.of_teacher
        table = jax.ShapeDtypeStruct((teacher.spec.vocab_size, teacher.spec.width), jnp.float32)
        planned += teacher.held_of({"unembedding": table}) * 4
    found = compiled(setup).memory_analysis()
    measured = found.argument_size_in_bytes + found.temp_size_in_bytes
    return planned, measured + found.output_size_in_bytes - found.alias_size_in_bytes


def compare_reading(rows: int, length: int) -> tuple[int, int]:
    """(bytes that the planner has, bytes that XLA has) of what a forward pass needs for itself."""
    case = Case("", 4096, {"train.batch_size": rows, "data.max_length": length})
    setup = setup_of(case)
    read = _batch(rows, length)
    program = predicting_hidden.lower(
        Decoder(setup.teacher.spec),
        abstract_params(setup.teacher.spec, jnp.float32),
        read.teacher_tokens_BT,
        read.teacher_mask_BT,
        read.teacher_at_BN,
    )
    measured = program.compile().memory_analysis().temp_size_in_bytes
    return memory.teacher_forward(setup)["one layer's pass"], measured


def setup_of(case: Case) -> PlanInputs:
    """Of float32 models; on several devices they have eight heads, and as many keys and values."""
    c, devices = configured(case), math.prod(case.mesh)
    specs = [decoder_spec(of["small"], case.vocab) for of in (STUDENTS, TEACHERS)]
    if devices > 1:
        specs = [dataclasses.replace(spec, num_heads=8, num_kv_heads=8) for spec in specs]
    weights = (Weights.of(spec, "float32") for spec in specs)
    return PlanInputs(c, *weights, False, mesh_of(c, devices))


def configured(case: Case) -> config.Config:
    """The defaults with the case's changes; its files are never read."""
    c = config.default()
    c.student.model = c.teacher.model = "none"
    c.teacher.backend, c.data.train = "flax", "none.jsonl"
    c.context.prefix_messages = ({"role": "system", "content": "?"},)
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = case.mesh
    c.eval.batch_size = 8
    c.update_from_flattened_dict(case.changes)
    return config.parse(c)


def compiled(setup: PlanInputs):
    """The optimizer step on the mesh, in float32, all rows at their longest."""
    c, student, teacher = setup.config, setup.student.spec, setup.teacher.spec
    mesh = parallel_mesh.make_mesh(*_axes(c), devices=jax.devices()[: setup.mesh.size])
    layouts = ShardingRules.of(mesh, student), ShardingRules.of(mesh, teacher)
    base, teacher_params = (
        _placed(layout, abstract_params(spec, jnp.float32))
        for layout, spec in zip(layouts, (student, teacher), strict=True)
    )
    trainable = base if setup.full else adapters(student, "float32", setup.rules)
    optimizer = train_optimizer.optimizer(c.optim, c.train.steps or 1)
    state = jax.eval_shape(lambda trainable: init_state(trainable, optimizer), trainable)
    decoder = Decoder(student, remat=c.train.remat, layout=layouts[0])
    step = make_train_step(decoder, optimizer, train_optimizer.schedule(c.optim, 1), c, mesh)
    batch = _cut(mesh, _batch(c.train.batch_size, c.data.max_length))
    anchors = {}
    if c.anchor.data is not None:
        of_anchor = _cut(mesh, _batch(c.anchor.batch_size, c.data.max_length))
        anchors = {"anchor": (of_anchor, _targets(mesh, c, student, base, of_anchor))}
    targets = _targets(mesh, c, teacher, teacher_params, batch)
    frozen, kind = None if setup.full else base, c.gkd.divergence
    state = _placed(layouts[0], state)
    return step.lower(state, frozen, batch, targets, anchors, divergence=kind).compile()


def _axes(c: config.Config) -> tuple[int, int, int]:
    return c.mesh.data, c.mesh.fsdp, c.mesh.tensor


def _placed(layout: ShardingRules, leaves):
    """Shapes that say where they lie."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        leaves,
        layout.shardings_of(leaves),
    )


def _cut(mesh: Mesh, rows):
    place = NamedSharding(mesh, parallel_mesh.ROWS)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), rows)


def _batch(rows: int, length: int) -> Batch:
    def each(dtype=jnp.int32):
        return jax.ShapeDtypeStruct((rows, length), dtype)

    return Batch(
        student_tokens_BS=each(),
        student_mask_BS=each(bool),
        student_at_BN=each(),
        teacher_tokens_BT=each(),
        teacher_mask_BT=each(bool),
        teacher_at_BN=each(),
        target_ids_BN=each(),
        target_mask_BN=each(bool),
        row_id_B=jax.ShapeDtypeStruct((rows,), jnp.int32),
    )


def _targets(
    mesh: Mesh, c: config.Config, spec: DecoderConfig, params: dict, batch: Batch
) -> TeacherTargets:
    def each(*last, dtype=jnp.float32):
        shape = (*batch.target_mask_BN.shape, *last)
        return _cut(mesh, jax.ShapeDtypeStruct(shape, dtype))

    k = c.teacher.top_k
    if k is None:
        return DenseTargets(each(spec.width), unembedding_table(spec, params), spec.final_softcap)
    topk = TopKLogprobs(each(k, dtype=jnp.int32), each(k), each(), c.gkd.temperature)
    return TopKTargets(topk, each())


if __name__ == "__main__":
    main()
