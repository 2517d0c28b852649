"""A plan as people read it."""

from collections.abc import Sequence

from gkdjax.planning import flops
from gkdjax.planning.advice import Change
from gkdjax.planning.bytes_of import total
from gkdjax.planning.chips import RESERVE, Devices
from gkdjax.planning.models import Setup
from gkdjax.planning.plan import Plan
from gkdjax.progress import size, table

_WIDEST = 60


def memory(plan: Plan) -> str:
    """Bytes on each device, by part; then the largest phase."""
    rows = [["always", part, size(n)] for part, n in plan.held.items() if n]
    for phase, parts in plan.phases.items():
        rows += [[phase, part, size(n)] for part, n in parts.items() if n]
        rows.append([phase, "all of it, and what is always there", size(_at(plan, phase))])
    rows.append(["peak", f"in: {plan.largest_phase}", size(plan.peak)])
    return table(["when", "what, on each device", "size"], rows, _WIDEST, left=2)


def _at(plan: Plan, phase: str) -> int:
    return total(plan.held) + total(plan.phases[phase])


def verdict(plan: Plan, devices: Devices) -> str:
    """Whether it fits, in one line."""
    limit = devices.chip.usable_bytes
    if limit is None:
        return f"{devices.name}: how much memory it has is not known here"
    fits = "fits" if plan.peak <= limit else "DOES NOT FIT"
    whole = size(devices.chip.hbm_bytes)
    return f"{devices.name}: {fits}: {size(plan.peak)} of {whole} less {RESERVE:.0%} on each device"


def advice(changes: Sequence[Change]) -> str:
    """What to change, largest saving first."""
    if not changes:
        return "No single change of the config saves any of the peak: take larger devices."
    rows = [[f"--config.{c.key}={c.value}", size(c.saves)] for c in changes]
    return table(["change, each by itself", "saves"], rows, _WIDEST)


def work(setup: Setup, devices: Devices) -> str:
    """FLOPs and seconds of a step, by part."""
    parts = flops.step(setup)
    whole = flops.Work("all", sum(w.flops for w in parts), sum(w.bytes_read for w in parts))
    rows = [[w.name, f"{w.flops / 1e12:.3g}", _seconds(w, setup, devices)] for w in (*parts, whole)]
    how = (
        f"Estimates of one device's share, all rows as long as allowed, at {flops.UTILISATION:.0%}"
        f" of the bfloat16 peak (half of that for float32) and {flops.BANDWIDTH:.0%} of the"
        " memory's bandwidth."
    )
    return table(["an optimizer step", "TFLOP", "seconds"], rows, _WIDEST) + "\n" + how


def _seconds(part: flops.Work, setup: Setup, devices: Devices) -> str:
    found = flops.seconds(part, setup, devices.chip)
    return "?" if found is None else f"{found:.3g}"
