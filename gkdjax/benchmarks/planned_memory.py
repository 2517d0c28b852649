"""The planner's programs beside XLA's own account of them: compiled on a CPU, never run.

    JAX_PLATFORMS=cpu python -m gkdjax.benchmarks.planned_memory

Random models of Gemma's kind, as shapes alone; float32, as XLA's CPU backend computes bfloat16 in
it.
"""

import typing

import jax
import jax.numpy as jnp

from gkdjax import config, optim, sharding
from gkdjax.benchmarks.case import STUDENTS, TEACHERS, decoder_spec
from gkdjax.lora import LoraRules
from gkdjax.losses import TopKLogprobs
from gkdjax.models.decoder import Decoder, abstract_params, unembedding_table
from gkdjax.models.spec import DecoderSpec
from gkdjax.planning import bytes_of
from gkdjax.planning.activations import adapters
from gkdjax.planning.models import Setup, Weights
from gkdjax.prefix_store import predicting_hidden
from gkdjax.progress import size, table
from gkdjax.train_step import init_state, make_train_step
from gkdjax.types import Batch, DenseTargets, TeacherTargets, TopKTargets


class Case(typing.NamedTuple):
    """What is planned and compiled."""

    name: str
    vocab: int  # of both models
    changes: dict  # of the config, by key


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
        | {"train.batch_size": 8, "train.accumulation": 2}
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
READINGS = ((8, 256), (4, 1024), (32, 64))  # rows, positions: of the teacher's forward pass


def main() -> None:
    rows = []
    for case in CASES:
        planned, measured = compare(case)
        name = f"step: {case.name}"
        rows.append([name, size(planned), size(measured), f"{planned / measured - 1:+.1%}"])
    for rows_at_once, length in READINGS:
        planned, measured = compare_reading(rows_at_once, length)
        name = f"teacher's forward pass, {rows_at_once} x {length:,}"
        rows.append([name, size(planned), size(measured), f"{planned / measured - 1:+.1%}"])
    print(table(["program", "planned", "XLA", "difference"], rows, widest=60))


def compare(case: Case) -> tuple[int, int]:
    """(bytes that the planner has, bytes that XLA has) of the training step and its arguments."""
    c = configured(case)
    student, teacher = (decoder_spec(of["small"], case.vocab) for of in (STUDENTS, TEACHERS))
    setup = Setup(c, *(Weights.of(spec, "float32") for spec in (student, teacher)), False, 1)
    planned = bytes_of.total(bytes_of.training_step(setup))
    planned += sum(n for part, n in bytes_of.held(setup).items() if not part.startswith("teacher"))
    if c.teacher.top_k is None:
        planned += teacher.vocab_size * teacher.width * 4  # all that the step reads of the teacher
    found = compiled(c, student, teacher).memory_analysis()
    measured = found.argument_size_in_bytes + found.temp_size_in_bytes
    return planned, measured + found.output_size_in_bytes - found.alias_size_in_bytes


def compare_reading(rows: int, length: int) -> tuple[int, int]:
    """(bytes that the planner has, bytes that XLA has) of what a forward pass needs for itself."""
    c = configured(Case("", 4096, {"train.batch_size": rows, "data.max_length": length}))
    spec = decoder_spec(TEACHERS["small"], 4096)
    setup = Setup(c, Weights.of(spec, "float32"), Weights.of(spec, "float32"), False, 1)
    read = _batch(rows, length)
    program = predicting_hidden.lower(
        Decoder(spec),
        abstract_params(spec, jnp.float32),
        read.teacher_tokens_BT,
        read.teacher_mask_BT,
        read.teacher_at_BN,
    )
    measured = program.compile().memory_analysis().temp_size_in_bytes
    return bytes_of.teacher_forward(setup)["one layer's pass"], measured


def configured(case: Case) -> config.Config:
    """The defaults with the case's changes; its files are never read."""
    c = config.default()
    c.student.model = c.teacher.model = "none"
    c.teacher.backend, c.data.train = "flax", "none.jsonl"
    c.context.prefix_messages = ({"role": "system", "content": "?"},)
    c.update_from_flattened_dict(case.changes)
    return config.parse(c)


def compiled(c: config.Config, student: DecoderSpec, teacher: DecoderSpec):
    """The optimizer step of `c` on one device, in float32, all rows at their longest."""
    base, teacher_params = (abstract_params(spec, jnp.float32) for spec in (student, teacher))
    full = c.student.adapter == "none"
    trainable = base if full else adapters(student, "float32", _rules(c))
    optimizer = optim.optimizer(c.optim, c.train.steps or 1)
    state = jax.eval_shape(lambda trainable: init_state(trainable, optimizer), trainable)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    decoder = Decoder(student, remat=c.train.remat)
    step = make_train_step(decoder, optimizer, optim.schedule(c.optim, 1), c, mesh)
    batch = _batch(c.train.batch_size, c.data.max_length)
    anchors = {}
    if c.anchor.data is not None:
        of_anchor = _batch(c.anchor.batch_size, c.data.max_length)
        anchors = {"anchor": (of_anchor, _targets(c, student, base, of_anchor))}
    targets = _targets(c, teacher, teacher_params, batch)
    frozen, kind = None if full else base, c.gkd.divergence
    return step.lower(state, frozen, batch, targets, anchors, divergence=kind).compile()


def _rules(c: config.Config) -> LoraRules:
    lora = c.student.lora
    return LoraRules(lora.rank, lora.alpha, lora.dropout, lora.targets)


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


def _targets(c: config.Config, spec: DecoderSpec, params: dict, batch: Batch) -> TeacherTargets:
    def each(*last, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((*batch.target_mask_BN.shape, *last), dtype)

    k = c.teacher.top_k
    if k is None:
        return DenseTargets(each(spec.width), unembedding_table(spec, params), spec.final_softcap)
    topk = TopKLogprobs(each(k, dtype=jnp.int32), each(k), each(), c.gkd.temperature)
    return TopKTargets(topk, each())


if __name__ == "__main__":
    main()
