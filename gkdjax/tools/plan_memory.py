"""Says what a run takes on each device, and whether it fits, before anything is loaded.

    python -m gkdjax.tools.plan_memory --config=configs/gemma3.py --chips=1xH200,v5e-8

Of the models it reads config.json, and the headers of tensor files that are there. The training
step's bytes were compared with XLA's own account (`gkdjax.benchmarks.planned_memory`); what is left
out is named in `gkdjax.train.planning.memory`, and seconds are rough
(`gkdjax.train.planning.flops`).
"""

import json
import os
import pathlib

from absl import flags

from gkdjax import config
from gkdjax.config import cli

flags.adopt_module_key_flags(cli)
_CHIPS = flags.DEFINE_list(
    "chips", ["cpu"], "Devices: 1xH200, 8xH100, 1xB200, v5e-8, v5p-32, v6e-8, tpu7x-32, cpu."
)
_JSON = flags.DEFINE_string("json", None, "Where the plans are written to, too.")


def main(parsed: config.Config, workdir: pathlib.Path) -> None:
    """The plan of a config on each of --chips."""
    del workdir
    os.environ["JAX_PLATFORMS"] = "cpu"  # shapes alone: an accelerator is left to who needs it
    from gkdjax.train.planning import chips
    from gkdjax.train.planning import setup as planning_setup

    named = [chips.named(name) for name in _CHIPS.value]
    found = [_show(planning_setup.read(parsed, devices.count), devices) for devices in named]
    if _JSON.value is not None:
        pathlib.Path(_JSON.value).write_text(json.dumps(found, indent=2) + "\n")


def _show(setup, devices) -> dict:
    """Prints the plan on these devices -> what the JSON file has of it."""
    from gkdjax.train.planning import advice, collectives, flops, meshes, plan, text

    planned, limit = plan.make(setup), devices.chip.usable_bytes
    fits = None if limit is None else planned.peak <= limit
    choice = None if limit is None else meshes.choose(setup, devices.chip)
    changes = [] if fits is not False else advice.changes(setup, limit, choice.best)
    print(f"{devices.name}: {text.mesh(setup)}")
    print(text.memory(planned), "", text.work(setup, devices), "", sep="\n")
    print(text.verdict(planned, devices))
    if choice is not None:
        print(text.best_mesh(choice))
    if fits is False:
        print(text.advice(changes))
    work, sent = flops.step(setup), collectives.step(setup)
    seconds = {part.name: flops.seconds(part, setup, devices.chip) for part in work}
    return {
        "chips": devices.name,
        "devices": devices.count,
        "mesh": dict(setup.mesh.shape),
        "held": planned.held,
        "phases": planned.phases,
        "lower_bound": planned.lower_bound,
        "peak_bytes": planned.peak,
        "usable_bytes": limit,
        "fits": fits,
        "best_mesh": choice and choice.best and choice.best._asdict(),
        "changes": [change._asdict() for change in changes],
        "flops": {part.name: part.flops for part in work},
        "bytes_sent": {each.name: each.bytes_sent for each in sent},
        "seconds": seconds | {each.name: collectives.seconds(each, devices.chip) for each in sent},
        "seconds_per_step": collectives.whole_step(setup, devices.chip),
    }


if __name__ == "__main__":
    cli.run(main)
