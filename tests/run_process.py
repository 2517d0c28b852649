"""One of the processes that make a small run; started by test_two_processes.py.

    python run_process.py SPEC.json WORKDIR COORDINATOR PROCESSES INDEX

SPEC is {"student": a model's directory, "server": an address or null, "changes": of the config}.
Two processes have two devices together, more have one each. It ends as `gkdjax.main` does.
"""

import json
import os
import pathlib
import sys

import compiling
from absl import logging

os.environ["XLA_FLAGS"] = compiling.devices(max(2 // int(sys.argv[4]), 1))

import jax
from server_runs import config_for
from small_runs import small

import gkdjax
from gkdjax.config import cli
from gkdjax.parallel import multihost
from gkdjax.utils import remote
from gkdjax.utils.errors import GkdjaxError

multihost._SEEN_WITHIN_S = 2  # on this machine's disk
remote.EVERY_S, remote._SILENT_S = 0.2, 3.0


def main(spec: str, workdir: str, coordinator: str, count: str, index: str) -> None:
    logging.use_absl_handler()
    logging.get_absl_handler().addFilter(cli._is_for_people)
    if int(count) > 1:
        jax.distributed.initialize(coordinator, int(count), int(index))
    asked = json.loads(pathlib.Path(spec).read_text())
    if asked["server"]:
        c = config_for(asked["student"], asked["server"], **asked["changes"])
    else:
        c = small(asked["student"], **asked["changes"])
    try:
        gkdjax.run(c, workdir)
    except GkdjaxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        jax.distributed.shutdown()
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
