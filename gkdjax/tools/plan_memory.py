"""Plans the bytes of a run on each device, and says whether it fits, before anything is loaded.

    python -m gkdjax.tools.plan_memory --config=configs/gemma3.py --chips=1xH200,v5e-8

It reads each model's config.json, and the headers of tensor files where they exist. The training
step's bytes were compared with XLA's own account (`gkdjax.benchmarks.planned_memory`);
`gkdjax.train.planning.memory` names everything that is left out.
"""

import json
import os
import pathlib

from absl import flags

from gkdjax import config
from gkdjax.config import cli
from gkdjax.utils.files import write_text
from gkdjax.utils.text import size, table

flags.adopt_module_key_flags(cli)
_CHIPS = flags.DEFINE_list(
    "chips", ["cpu"], "Devices: 1xH200, 8xH100, 1xB200, v5e-8, v5p-32, v6e-8, tpu7x-32, cpu."
)
_JSON = flags.DEFINE_string("json", None, "A file to write the plans to, too.")


def main(parsed: config.Config, workdir: str) -> None:
    """Prints the plan of a config on each of --chips."""
    del workdir
    os.environ["JAX_PLATFORMS"] = "cpu"  # shapes alone: an accelerator stays free
    from gkdjax.train.planning import chips
    from gkdjax.train.planning import setup as planning_setup

    named = [chips.named(name) for name in _CHIPS.value]
    plans = [_show(planning_setup.read(parsed, devices.count), devices) for devices in named]
    if _JSON.value is not None:
        write_text(pathlib.Path(_JSON.value), json.dumps(plans, indent=2) + "\n")


def _show(setup, devices) -> dict:
    """Prints the plan on these devices -> the same for the JSON file."""
    from gkdjax.train.planning import advice, chips, memory

    planned, limit = memory.plan(setup), devices.usable_bytes
    shown = {
        "chips": devices.name,
        "devices": devices.count,
        "mesh": dict(setup.mesh.shape),
        "held": planned.held,
        "phases": planned.phases,
        "lower_bound": planned.lower_bound,
        "peak_bytes": planned.peak,
        "usable_bytes": limit,
    }
    axes = ", ".join(f"{axis}={number}" for axis, number in setup.mesh.shape.items())
    slices = f", in {setup.slices} slices" if setup.slices > 1 else ""
    print(f"{devices.name}: {setup.mesh.size} devices on a mesh of {axes}{slices}")
    print(f"{planned.table()}\n")
    if limit is None:
        print(f"{devices.name}: how much memory it has is not known here")
        return shown | {"fits": None, "best_mesh": None, "fitting_meshes": None, "changes": []}
    fits, meshes = planned.peak <= limit, advice.meshes(setup, limit)
    memory_size = f"{size(devices.hbm_bytes)} less {chips.RESERVE:.0%} on each device"
    verdict = "fits" if fits else "DOES NOT FIT"
    print(f"{devices.name}: {verdict}: {size(planned.peak)} of {memory_size}\n{_meshes(meshes)}")
    changes = [] if fits else advice.changes(setup, limit, meshes.best)
    rows = [[_flags(change.settings), size(change.saves)] for change in changes]
    if rows:
        print(table(["change, each by itself", "saves"], rows, widest=60))
    elif not fits:
        print("No single change of the config saves any of the peak: take larger devices.")
    return shown | {
        "fits": fits,
        "best_mesh": meshes.best and meshes.best._asdict(),
        "fitting_meshes": [mesh._asdict() for mesh in meshes.fitting],
        "changes": [change._asdict() for change in changes],
    }


def _meshes(meshes) -> str:
    """Names the best mesh and the number of meshes to choose from."""
    counts = f"{len(meshes.fitting)} of {meshes.tried} meshes of these devices fit"
    counts += "".join(f"; {count} do not divide {what}" for what, count in meshes.refused.items())
    if meshes.best is None:
        return f"best mesh: none; {counts}"
    how = _flags(meshes.best.settings) or "this one"
    return (
        f"best mesh: {how}: {size(meshes.best.peak)} on each device; {counts}\n"
        "It shards over the fewest of fsdp and tensor; among equals it takes the least memory."
    )


def _flags(settings: dict) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in settings.items())


if __name__ == "__main__":
    cli.run(main)
