"""What one device computes for an optimizer step, by part, and in how many seconds.

Estimates, from counts and a chip's peak numbers: matrix products alone, all rows as long as the
longest that is allowed and with `trajectory.max_new_tokens` targets each. A step is slower where it
compiles or waits for a server, faster where rows are short. What devices tell each other:
`gkdjax.train.planning.collectives`.
"""

from typing import NamedTuple

from gkdjax.config import anchor_sets
from gkdjax.train.planning import memory
from gkdjax.train.planning.chips import Chip
from gkdjax.train.planning.setup import PlanInputs, itemsize
from gkdjax.train.planning.shards import Shard

UTILISATION = 0.4  # of a chip's bfloat16 peak; of half of it where products are float32
BANDWIDTH = 0.6  # of a chip's, while tokens are drawn one by one


class Work(NamedTuple):
    """One part of a step, on one device."""

    name: str
    flops: float
    bytes_read: float = 0.0  # from memory, where that takes longer


def step(setup: PlanInputs) -> list[Work]:
    """What one device computes for an optimizer step; on-policy text by its share of the steps."""
    c, rows, teacher = setup.config, setup.rows("train"), setup.of_teacher
    anchors = [setup.rows("anchor")] * len(anchor_sets(c.anchor))
    all_rows, of_teacher = rows + sum(anchors), rows if teacher is not None else 0
    found = [Work("student, forward", forward(setup, setup.of_student, all_rows))]
    found.append(Work("student, backward", _backward(setup, all_rows)))
    of_base = sum(anchors) if c.anchor.towards == "base" else 0
    of_teacher += 0 if of_base or teacher is None else sum(anchors)
    if teacher is not None:
        found.append(Work("teacher, forward", forward(setup, teacher, of_teacher)))
    if of_base:
        found.append(Work("base for the anchor", forward(setup, setup.of_student, of_base)))
    found.append(Work("head", _head(setup, all_rows, of_teacher, of_base)))
    if c.gkd.on_policy_fraction > 0:
        found.append(_on_policy(setup, rows))
    return found


def seconds(work: Work, setup: PlanInputs, chip: Chip) -> float | None:
    """None of a chip whose numbers are unknown."""
    if chip.bf16_flops is None:
        return None
    halved = 0.5 if setup.config.student.compute_dtype == "float32" else 1.0
    computing = work.flops / (chip.bf16_flops * halved * UTILISATION)
    return computing + work.bytes_read / (chip.hbm_bytes_per_s * BANDWIDTH)


def forward(setup: PlanInputs, shard: Shard, rows: int) -> float:
    """FLOPs of all layers, over whole rows; scores that are masked count."""
    return rows * setup.length * (2 * shard.kernels + _attention(setup, shard))


def _attention(setup: PlanInputs, shard: Shard) -> float:
    """Scores and weighted sums of one token."""
    T, spec = setup.length, shard.local
    full = sum(spec.is_global_L)
    seen = full * T + (spec.num_layers - full) * min(T, 2 * (spec.window or T))
    return 4 * spec.num_heads * spec.head_dim * seen


def _backward(setup: PlanInputs, rows: int) -> float:
    """Gradients to inputs cost a forward pass; those to kernels another, if they are trained."""
    shard, tokens = setup.of_student, rows * setup.length
    passes = 1 + int(setup.config.train.remat)
    adapters = 0 if setup.full else shard.gathered_of(memory.adapters(setup))
    kernels = shard.kernels if setup.full else adapters
    once = forward(setup, shard, rows)
    attention = tokens * _attention(setup, shard)  # has two inputs
    return passes * once + attention + tokens * (2 * kernels + 2 * (passes + 1) * adapters)


def _head(setup: PlanInputs, rows: int, of_teacher: int, of_base: int) -> float:
    c, student = setup.config, setup.of_student.local
    targets = min(setup.length, c.trajectory.max_new_tokens)
    passes = 3 if setup.full else 2  # logits, gradient to hidden states, and to the table
    found = passes * rows * student.width + of_base * student.width
    if setup.of_teacher is not None:
        found += of_teacher * setup.of_teacher.spec.width
    return 2.0 * targets * student.vocab_size * found


def _on_policy(setup: PlanInputs, rows: int) -> Work:
    """Prompts are read at once; then each token of all rows reads all weights and the cache."""
    c, shard = setup.config, setup.of_student
    share, new = c.gkd.on_policy_fraction, c.trajectory.max_new_tokens
    weights = shard.gathered * itemsize(memory.student_dtype(setup))
    read = new * (weights + memory.kv_bytes(setup, shard, setup.length) * rows)
    flops = forward(setup, shard, rows) + rows * new * 2 * (shard.kernels + shard.table)
    return Work("student's writing, on average", share * flops, share * read)
