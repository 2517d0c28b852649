"""What one device sends to others for an optimizer step, by kind, and in how many seconds.

Estimates: of n devices in a ring, each sends (n - 1) / n of an array for a gather or a
reduce-scatter, and twice that for an all-reduce. Nothing is hidden behind computing.
"""

from collections.abc import Iterator
from typing import NamedTuple

from gkdjax.train.planning import flops, memory
from gkdjax.train.planning.chips import Chip
from gkdjax.train.planning.setup import PlanInputs, itemsize
from gkdjax.train.planning.shards import Shard

LATENCY = 1e-5  # seconds of a message, however short: a round number


class Exchange(NamedTuple):
    """One kind."""

    name: str
    bytes_sent: float
    messages: float
    between_slices: bool = False  # over the data-centre network


def step(setup: PlanInputs) -> list[Exchange]:
    """Of an optimizer step; on-policy text by its share of the steps."""
    pieces = *_over_data(setup), *_over_fsdp(setup), *_over_tensor(setup)
    found: dict[str, Exchange] = {}
    for each in pieces:
        if each.name in found:
            before = found[each.name]
            sent = before.bytes_sent + each.bytes_sent
            each = before._replace(bytes_sent=sent, messages=before.messages + each.messages)
        if each.bytes_sent:
            found[each.name] = each
    return [*found.values()]


def seconds(exchange: Exchange, chip: Chip) -> float | None:
    """None of a chip whose numbers are unknown."""
    speed = chip.network_bytes_per_s if exchange.between_slices else chip.link_bytes_per_s
    if speed is None:
        return None
    return exchange.bytes_sent / (speed * flops.BANDWIDTH) + exchange.messages * LATENCY


def whole_step(setup: PlanInputs, chip: Chip) -> float | None:
    """Seconds of computing and of collectives, one after the other."""
    if chip.bf16_flops is None:
        return None
    computing = sum(flops.seconds(part, setup, chip) for part in flops.step(setup))
    return computing + sum(seconds(each, chip) for each in step(setup))


def _ring(devices: int) -> float:
    return (devices - 1) / devices


def _over_data(setup: PlanInputs) -> Iterator[Exchange]:
    """Within each slice first, so that its devices share what the slices tell each other."""
    shard, within = setup.of_student, setup.mesh.shape["data"] // setup.slices
    times = _passes(setup)
    gradients = times * (memory.trained(setup) + _looked_up(setup) // shard.fsdp)
    messages = times * shard.spec.num_layers
    yield Exchange("gradients, over data", 2 * _ring(within) * gradients, messages)
    across = 2 * _ring(setup.slices) * gradients / within
    yield Exchange("gradients, over slices", across, messages, between_slices=True)


def _passes(setup: PlanInputs) -> int:
    """Backward passes: each has its own gradients, which are added up layer by layer."""
    return setup.config.train.accumulation * len(memory.training_rows(setup))


def _looked_up(setup: PlanInputs) -> int:
    """Bytes of a tied table's second gradient: the head's and the look-up's are sent apart."""
    spec = setup.student.spec
    return 4 * setup.of_student.table if setup.full and spec.tied_embedding else 0


def _over_fsdp(setup: PlanInputs) -> Iterator[Exchange]:
    """Weights, gathered layer by layer, and gradients on their way back."""
    shard, passes = setup.of_student, _passes(setup)

    def gathers(of: Shard, numbers: float, times: float) -> Exchange:
        sent = _ring(of.fsdp) * times * numbers * itemsize(memory.dtype_of(setup, of))
        return Exchange("weights, over fsdp", sent, times * of.spec.num_layers)

    yield gathers(shard, shard.gathered, passes)
    yield gathers(shard, shard.spec.num_layers * shard.layer, passes)  # tables are kept
    gradients = passes * (memory.trained(setup, gathered=True) + _looked_up(setup))
    messages = passes * shard.spec.num_layers
    yield Exchange("gradients, over fsdp", _ring(shard.fsdp) * gradients, messages)
    for _, teacher in memory.training_rows(setup):
        if teacher is not None:
            yield gathers(teacher, teacher.gathered, 1)
    yield gathers(shard, shard.gathered, setup.config.gkd.on_policy_fraction)


def _over_tensor(setup: PlanInputs) -> Iterator[Exchange]:
    """The sums that end attention and MLP of each layer, that of looking tokens up, the head's.

    Backward, gradients to the same states are added before they are sent, as accelerators'
    compilers do; XLA's CPU backend sends those of q, k, v, gate and up apart.
    """
    c, shard, new = setup.config, setup.of_student, setup.config.trajectory.max_new_tokens
    size = itemsize(c.student.compute_dtype)

    def sums(of: Shard, tokens: float, each: float, messages: float) -> Exchange:
        sent = 2 * _ring(of.tensor) * tokens * of.spec.width * size * each
        return Exchange("activations, over tensor", sent, messages)

    for rows, teacher in memory.training_rows(setup):
        # Forward, backward, and forward once more where layers are recomputed.
        passes = (2 + int(c.train.remat)) * _sums(shard)
        tokens = rows * setup.length
        yield sums(shard, tokens, passes, passes * c.train.accumulation)
        yield sums(shard, rows * min(setup.length, new), 1, c.train.accumulation)
        if teacher is not None:
            yield sums(teacher, tokens, _sums(teacher), _sums(teacher))
    share, each = c.gkd.on_policy_fraction, _sums(shard)
    tokens = setup.rows("train") * (setup.length + new)
    yield sums(shard, share * tokens, each, share * (1 + new) * each)


def _sums(shard: Shard) -> int:
    return 2 * shard.spec.num_layers + 1
