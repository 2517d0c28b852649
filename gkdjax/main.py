"""python -m gkdjax.main --config=configs/quickstart.py [--workdir=DIR] [--config.a.b=value]"""

import math
import os
import pathlib

from absl import flags

from gkdjax import config
from gkdjax.config import cli
from gkdjax.utils import huge_pages

flags.adopt_module_key_flags(cli)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, with --num_processes and --process_id: for several processes that JAX"
    " does not find by itself (it does on TPU pods, under Slurm and Open MPI).",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes make the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_COORDINATOR_TIMEOUT_S = flags.DEFINE_float(
    "coordinator_timeout_s",
    300.0,
    "Within so many seconds all processes have to be there; else the exit code is 4.",
    lower_bound=1.0,
)


def main(parsed: config.Config, workdir: str) -> None:
    """Makes the run of a config."""
    # jax and the models are imported only once the config is known to be right.
    from gkdjax.parallel import bootstrap

    where = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    timeout_s = _COORDINATOR_TIMEOUT_S.value
    with bootstrap.joined(*where, timeout_s, parsed.train.watchdog_s) as processes:
        bootstrap.require_same({"config": config.to_dict(parsed)} | bootstrap.code(), timeout_s)
        if processes == 1:
            _share_cores(parsed)
        from gkdjax.train import run

        run.run(parsed, workdir)


_SMALL_MODEL_BYTES = 64 * 2**20
_FEWEST_ROWS_PER_CORE = 8


def _share_cores(parsed: config.Config) -> None:
    """Makes an XLA device of each CPU core, for small models: they share the rows of a batch.

    XLA's CPU backend computes most of a small model on one core. A large model's matrix products
    use all of them anyway, and every device would hold a copy of it. The flag does not touch other
    devices, and a number that the user has set stays. Several processes on CPUs have one device
    each: all need the same number, and may be on different machines.
    """
    flag, given = "--xla_force_host_platform_device_count", os.environ.get("XLA_FLAGS", "")
    models = [pathlib.Path(m) for m in {parsed.student.model, parsed.teacher.model} - {""}]
    weights = [path.stat().st_size for model in models for path in model.glob("*.safetensors")]
    local = all(model.is_dir() for model in models)  # those on the hub are not small
    if flag in given or not local or sum(weights) > _SMALL_MODEL_BYTES:
        return
    rows = math.gcd(*config.rows_at_once(parsed).values())
    cores = min(os.cpu_count() or 1, max(rows // _FEWEST_ROWS_PER_CORE, 1))
    count = max(n for n in range(1, cores + 1) if rows % n == 0)
    os.environ["XLA_FLAGS"] = f"{given} {flag}={count}".strip()


if __name__ == "__main__":
    huge_pages.begin_again()
    cli.run(main)
