"""python -m gkdjax.main --config=configs/quickstart.py [--workdir=DIR] [--config.a.b=value]"""

import math
import os
import pathlib

from absl import flags

from gkdjax import command_line, config

flags.adopt_module_key_flags(command_line)


def main(parsed: config.Config, workdir: pathlib.Path) -> None:
    """The run of a config."""
    _share_cores(parsed)
    from gkdjax import loop  # jax and the models: only once the config is known to be right

    loop.run(parsed, workdir)


_SMALL_MODEL_BYTES = 64 * 2**20
_FEWEST_ROWS_PER_CORE = 8


def _share_cores(parsed: config.Config) -> None:
    """Small models on a CPU: makes an XLA device of each core, and the rows of a batch use them.

    XLA's CPU backend computes most of a small model on one core. A large model's matrix products
    use all of them anyway, and every device would hold a copy of it. The flag does not touch
    devices that are no CPU, and a number that the user has set stays.
    """
    flag = "--xla_force_host_platform_device_count"
    given = os.environ.get("XLA_FLAGS", "")
    models = {parsed.student.model, parsed.teacher.model} - {""}
    weights = [
        path.stat().st_size
        for model in models
        for path in pathlib.Path(model).glob("*.safetensors")
    ]
    on_the_hub = not all(pathlib.Path(model).is_dir() for model in models)  # those are not small
    if flag in given or on_the_hub or sum(weights) > _SMALL_MODEL_BYTES:
        return
    rows = math.gcd(*config.rows_at_once(parsed).values())
    cores = min(os.cpu_count() or 1, max(rows // _FEWEST_ROWS_PER_CORE, 1))
    count = max(n for n in range(1, cores + 1) if rows % n == 0)
    os.environ["XLA_FLAGS"] = f"{given} {flag}={count}".strip()


if __name__ == "__main__":
    command_line.run(main)
