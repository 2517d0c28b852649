"""Seconds of one optimizer step by part: estimates, from counts and a chip's peak numbers.

Matrix products alone are counted, all rows as long as the longest that is allowed and with
`trajectory.max_new_tokens` targets each; one device's share. A step is slower where it compiles,
waits for a server or for other devices, faster where rows are short.
"""

from typing import NamedTuple

from gkdjax.config import anchor_sets
from gkdjax.models.spec import DecoderSpec, layer_shapes
from gkdjax.planning import bytes_of
from gkdjax.planning.chips import Chip
from gkdjax.planning.models import Setup, Weights

UTILISATION = 0.4  # of a chip's bfloat16 peak; of half of it where products are float32
BANDWIDTH = 0.6  # of a chip's, while tokens are drawn one by one


class Work(NamedTuple):
    """One part of a step."""

    name: str
    flops: float
    bytes_read: float = 0.0  # from memory, where that takes longer


def step(setup: Setup) -> list[Work]:
    """What one device computes for an optimizer step; on-policy text by its share of the steps."""
    c, rows, teacher = setup.config, setup.rows("train"), setup.in_process
    anchors = [setup.rows("anchor")] * len(anchor_sets(c.anchor))
    all_rows, of_teacher = rows + sum(anchors), rows if teacher is not None else 0
    found = [Work("student, forward", forward(setup, setup.student.spec, all_rows))]
    found.append(Work("student, backward", _backward(setup, all_rows)))
    of_base = sum(anchors) if c.anchor.towards == "base" else 0
    of_teacher += 0 if of_base or teacher is None else sum(anchors)
    if teacher is not None:
        found.append(Work("teacher, forward", forward(setup, teacher.spec, of_teacher)))
    if of_base:
        found.append(Work("base for the anchor", forward(setup, setup.student.spec, of_base)))
    found.append(Work("head", _head(setup, all_rows, of_teacher, of_base)))
    if c.gkd.on_policy_fraction > 0:
        found.append(_on_policy(setup, rows))
    return found


def seconds(work: Work, setup: Setup, chip: Chip) -> float | None:
    """None of a chip whose numbers are unknown."""
    if chip.bf16_flops is None:
        return None
    halved = 0.5 if setup.config.student.compute_dtype == "float32" else 1.0
    computing = work.flops / (chip.bf16_flops * halved * UTILISATION)
    return computing + work.bytes_read / (chip.hbm_bytes_per_s * BANDWIDTH)


def forward(setup: Setup, spec: DecoderSpec, rows: int) -> float:
    """FLOPs of all layers, over whole rows; scores that are masked count."""
    return rows * setup.length * (2 * _layers(spec) + _attention(setup, spec))


def _attention(setup: Setup, spec: DecoderSpec) -> float:
    """Scores and weighted sums of one token."""
    T, full = setup.length, sum(spec.is_global_L)
    seen = full * T + (spec.num_layers - full) * min(T, 2 * (spec.window or T))
    return 4 * spec.num_heads * spec.head_dim * seen


def _layers(spec: DecoderSpec) -> int:
    """Numbers in all kernels but the tables."""
    return sum(
        L * size[0] * size[1]
        for name, (L, *size) in layer_shapes(spec).items()
        if name.endswith("_proj")
    )


def _backward(setup: Setup, rows: int) -> float:
    """Gradients to inputs cost a forward pass; those to kernels another, if they are trained."""
    spec, tokens = setup.student.spec, rows * setup.length
    passes = 1 + int(setup.config.train.remat)
    kernels = _layers(spec) if setup.full else bytes_of.adapter_parameters(setup)
    adapters = 0 if setup.full else bytes_of.adapter_parameters(setup)
    once = forward(setup, spec, rows)
    attention = tokens * _attention(setup, spec)  # has two inputs
    return passes * once + attention + tokens * (2 * kernels + 2 * (passes + 1) * adapters)


def _head(setup: Setup, rows: int, of_teacher: int, of_base: int) -> float:
    c, student = setup.config, setup.student.spec
    targets = min(setup.length, c.trajectory.max_new_tokens)
    passes = 3 if setup.full else 2  # logits, gradient to hidden states, and to the table
    found = passes * rows * student.width + of_base * student.width
    if setup.in_process is not None:
        found += of_teacher * setup.in_process.spec.width
    return 2.0 * targets * student.vocab_size * found


def _on_policy(setup: Setup, rows: int) -> Work:
    """Prompts are read at once; then each token of all rows reads all weights and the cache."""
    c, spec, weights = setup.config, setup.student.spec, setup.student
    share, new = c.gkd.on_policy_fraction, c.trajectory.max_new_tokens
    cache = bytes_of.kv_bytes(spec, setup.length, c.student.compute_dtype) * rows
    read = new * (_parameters(setup, weights) + cache)
    head = 2 * spec.vocab_size * spec.width
    flops = forward(setup, spec, rows) + rows * new * (2 * _layers(spec) + head)
    return Work("student's writing, on average", share * flops, share * read)


def _parameters(setup: Setup, weights: Weights) -> int:
    return weights.nbytes("float32" if setup.full else setup.config.student.dtype)
