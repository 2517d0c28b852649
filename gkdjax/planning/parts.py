"""Bytes on one device that several phases of a run need."""

from gkdjax.config import anchor_sets
from gkdjax.config_models import SERVERS
from gkdjax.models.spec import DecoderSpec
from gkdjax.planning import activations
from gkdjax.planning.models import Setup, itemsize
from gkdjax.planning.shards import Shard

Parts = dict[str, int]  # name -> bytes

# Arrays [rows, heads, length, length] of float32 that attention holds at once: scores, masked
# scores, weights; and [rows, length, ffn width] of the MLP.
_SCORES, _MLP = 3, 2


def total(parts: Parts) -> int:
    return sum(parts.values())


def training_rows(setup: Setup) -> list[tuple[int, Shard | None]]:
    """(rows of one device, who teaches them in this process) of the batch and of each anchor."""
    anchor, teacher = setup.config.anchor, setup.of_teacher
    parts = [(setup.rows("train"), teacher)]
    towards = setup.of_student if anchor.towards == "base" else teacher
    return parts + [(setup.rows("anchor"), towards) for _ in anchor_sets(anchor)]


def adapters(setup: Setup) -> dict:
    """As `jax.ShapeDtypeStruct`; UserError for targets that match no kernel."""
    return activations.adapters(setup.student.spec, student_dtype(setup), setup.rules)


def trained(setup: Setup, gathered: bool = False) -> int:
    """Of what is trained, in float32: as it lies, or gathered over "fsdp"."""
    shard = setup.of_student
    if setup.full:
        return 4 * (shard.gathered if gathered else shard.held)
    count = shard.gathered_of if gathered else shard.held_of
    return 4 * count(adapters(setup))


def student_dtype(setup: Setup) -> str:
    """Of the parameters that a step computes with."""
    return "float32" if setup.full else setup.student.dtype(setup.config.student.dtype)


def dtype_of(setup: Setup, shard: Shard) -> str:
    """Of a model's parameters in memory."""
    if shard is setup.of_student:
        return student_dtype(setup)
    return setup.teacher.dtype(setup.config.teacher.dtype)


def targets(setup: Setup) -> int:
    """Ids, places and masks of both views, and what the teacher said, of all rows of a step."""
    batch = 6 * 4 + 3  # bytes a position
    return sum(
        rows * setup.length * (batch + target_bytes(setup, shard and shard.spec))
        for rows, shard in training_rows(setup)
    )


def target_bytes(setup: Setup, spec: DecoderSpec | None) -> int:
    """Of one target: hidden states of a model in this process, or the best K tokens."""
    c, server = setup.config, setup.config.teacher.backend in SERVERS
    if spec is None or (c.teacher.top_k is not None and not server):
        return 8 * (c.teacher.top_k or 0) + 8  # of a teacher that was handed in, K is unknown
    return spec.width * itemsize(c.student.compute_dtype)


def head(setup: Setup) -> int:
    """A chunk's logits, of the device's own words."""
    return setup.config.gkd.chunk_size * setup.of_student.local.vocab_size * 4


def tables(setup: Setup) -> int:
    """Unembeddings that are not used where they lie, but cast, or gathered over "fsdp"."""
    c, compute = setup.config, setup.config.student.compute_dtype
    heads = [setup.of_student]
    if c.teacher.top_k is None and setup.teacher is not None:
        heads.append(setup.of_teacher)
    return itemsize(compute) * sum(
        shard.table for shard in heads if shard.fsdp > 1 or dtype_of(setup, shard) != compute
    )


def layer_weights(setup: Setup, shard: Shard) -> int:
    """One layer's, taken out of the stack in the compute dtype; gathered first, as they lie."""
    compute, stored = setup.config.student.compute_dtype, dtype_of(setup, shard)
    gathered = itemsize(stored) if shard.fsdp > 1 and stored != compute else 0
    return shard.layer * (itemsize(compute) + gathered)


def forward(setup: Setup, shard: Shard, rows: int) -> int:
    """Working memory of a forward pass that nobody differentiates: that of its largest layer."""
    size, T, spec = itemsize(setup.config.student.compute_dtype), setup.length, shard.local
    seen = min(T, 2 * spec.window) if spec.window and not any(spec.is_global_L) else T
    scores = _SCORES * rows * spec.num_heads * T * seen * 4
    mlp = _MLP * rows * T * spec.ffn_width * size
    states = 3 * rows * T * spec.width * size
    return layer_weights(setup, shard) + states + max(scores, mlp)
