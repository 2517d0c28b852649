"""What one device sends to others for an optimizer step, by kind, and in how many seconds.

Estimates: of n devices in a ring, each sends (n - 1) / n of an array for a gather or a
reduce-scatter, and twice that for an all-reduce. The time that a message takes however short it is
does not count, and nothing is hidden behind computing.
"""

from typing import NamedTuple

from gkdjax.planning import flops, parts
from gkdjax.planning.chips import Chip
from gkdjax.planning.models import Setup, itemsize
from gkdjax.planning.shards import Shard


class Exchange(NamedTuple):
    """One kind."""

    name: str
    bytes_sent: float
    between_slices: bool = False  # over the data-centre network


def step(setup: Setup) -> list[Exchange]:
    """Of an optimizer step; on-policy text by its share of the steps. Empty kinds are left out."""
    shard, accumulation = setup.of_student, setup.config.train.accumulation
    found = [*_over_data(setup, accumulation * parts.trained(setup))]
    # Forward, backward, and the gradients on their way back; for the batch and for each anchor.
    once = 2 * _weights(setup, shard) + parts.trained(setup, gathered=True)
    weights = accumulation * len(parts.training_rows(setup)) * once
    activations = _training_states(setup)
    for rows, teacher in parts.training_rows(setup):
        if teacher is not None:
            weights += _weights(setup, teacher)
            activations += _states(setup, teacher, rows * setup.length)
    share = setup.config.gkd.on_policy_fraction
    tokens = setup.rows("train") * (setup.length + setup.config.trajectory.max_new_tokens)
    weights += share * _weights(setup, shard)
    activations += share * _states(setup, shard, tokens)
    found.append(Exchange("weights, over fsdp", _ring(shard.fsdp) * weights))
    found.append(Exchange("activations, over tensor", 2 * _ring(shard.tensor) * activations))
    return [each for each in found if each.bytes_sent]


def seconds(exchange: Exchange, chip: Chip) -> float | None:
    """None of a chip whose numbers are unknown."""
    speed = chip.network_bytes_per_s if exchange.between_slices else chip.link_bytes_per_s
    return None if speed is None else exchange.bytes_sent / (speed * flops.BANDWIDTH)


def whole_step(setup: Setup, chip: Chip) -> float | None:
    """Seconds of computing and of collectives, one after the other."""
    if chip.bf16_flops is None:
        return None
    computing = sum(flops.seconds(part, setup, chip) for part in flops.step(setup))
    return computing + sum(seconds(each, chip) for each in step(setup))


def _ring(devices: int) -> float:
    return (devices - 1) / devices


def _over_data(setup: Setup, gradients: int) -> list[Exchange]:
    """Within each slice first, so that its devices share what the slices tell each other."""
    within = setup.mesh.shape["data"] // setup.slices
    across = 2 * _ring(setup.slices) * gradients / within
    return [
        Exchange("gradients, over data", 2 * _ring(within) * gradients),
        Exchange("gradients, over slices", across, between_slices=True),
    ]


def _weights(setup: Setup, shard: Shard) -> int:
    """Bytes of a model once it is gathered: all of it, one layer after the other."""
    return shard.gathered * itemsize(parts.dtype_of(setup, shard))


def _states(setup: Setup, shard: Shard, tokens: int) -> int:
    """Bytes of the sums that end attention and MLP of each layer, and the looking up of tokens."""
    size = itemsize(setup.config.student.compute_dtype)
    return tokens * shard.spec.width * size * (2 * shard.spec.num_layers + 1)


def _training_states(setup: Setup) -> int:
    """Forward, backward, and forward once more where layers are recomputed; then the head's."""
    c, shard = setup.config, setup.of_student
    rows = sum(rows for rows, _ in parts.training_rows(setup))
    passes = 2 + int(c.train.remat)
    targets = min(setup.length, c.trajectory.max_new_tokens)
    head = rows * targets * shard.spec.width * itemsize(c.student.compute_dtype)
    return passes * _states(setup, shard, rows * setup.length) + head
