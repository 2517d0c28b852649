"""A plan as people read it."""

from collections.abc import Sequence

from gkdjax.train.planning import collectives, flops
from gkdjax.train.planning.advice import Change
from gkdjax.train.planning.chips import RESERVE, Devices
from gkdjax.train.planning.memory import total
from gkdjax.train.planning.meshes import Choice
from gkdjax.train.planning.plan import Plan
from gkdjax.train.planning.setup import PlanInputs
from gkdjax.utils.text import size, table

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
    rows = [[_flags(c.settings), size(c.saves)] for c in changes]
    return table(["change, each by itself", "saves"], rows, _WIDEST)


def mesh(setup: PlanInputs) -> str:
    """How the devices share the run, in one line."""
    told = ", ".join(f"{axis}={number}" for axis, number in setup.mesh.shape.items())
    slices = f", in {setup.slices} slices" if setup.slices > 1 else ""
    return f"{setup.mesh.size} devices on a mesh of {told}{slices}"


def best_mesh(choice: Choice) -> str:
    """The mesh to take, and how many there were to choose from."""
    told = f"{choice.fitting} of {choice.tried} meshes of these devices fit"
    told += "".join(f"; {count} do not divide {what}" for what, count in choice.refused.items())
    best = choice.best
    if best is None:
        return f"best mesh: none; {told}"
    how = _flags(best.settings) or "this one"
    return (
        f"best mesh: {how}: {best.seconds:.3g} seconds a step, {size(best.peak)} on each device;"
        f" {told}"
    )


def _flags(settings: dict) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in settings.items())


def work(setup: PlanInputs, devices: Devices) -> str:
    """FLOPs, bytes that are sent, and seconds of a step, by part."""
    chip = devices.chip
    rows = [
        [part.name, f"{part.flops / 1e12:.3g}", "", _seconds(flops.seconds(part, setup, chip))]
        for part in flops.step(setup)
    ]
    rows += [
        [each.name, "", size(round(each.bytes_sent)), _seconds(collectives.seconds(each, chip))]
        for each in collectives.step(setup)
    ]
    whole = sum(part.flops for part in flops.step(setup)) / 1e12
    rows.append(["all", f"{whole:.3g}", "", _seconds(collectives.whole_step(setup, chip))])
    how = (
        f"Estimates of one device's share, all rows as long as allowed, at {flops.UTILISATION:.0%}"
        f" of the bfloat16 peak (half of that for float32) and {flops.BANDWIDTH:.0%} of the"
        " memory's and the interconnect's bandwidth."
    )
    return table(["an optimizer step", "TFLOP", "sent", "seconds"], rows, _WIDEST) + "\n" + how


def _seconds(found: float | None) -> str:
    return "?" if found is None else f"{found:.3g}"
