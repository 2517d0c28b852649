"""A program that joins a cluster as `gkdjax.main` does; the tests here start it several times.

    python cluster_probe.py DOES [COORDINATOR PROCESSES PROCESS]

DOES is its action after it has joined: "meet" prints the numbers of all processes; "fail" raises an
expected error in process 1 while process 0 waits for it; "bug" an unexpected one; "last" raises in
process 1 when process 0 is done; "alone" prints the number of processes and of devices, and whether
it is connected.
"""

import os
import sys
import time

import jax
from absl import logging
from jax.experimental import multihost_utils

from gkdjax.parallel import bootstrap, shutdown
from gkdjax.utils.errors import GkdjaxError, TrainingFailure

shutdown.GRACE_S = 2.0
FAILS = {"fail": TrainingFailure, "last": TrainingFailure, "bug": RuntimeError}


def main(does: str, coordinator=None, processes=None, process=None) -> None:
    where = coordinator, processes and int(processes), process and int(process)
    with bootstrap.joined(*where, 60.0) as count:
        bootstrap.require_same(bootstrap.code(), 60.0)
        own = jax.distributed.is_initialized() and int(jax.process_index())
        if does == "alone":
            print("alone", count, jax.device_count(), jax.distributed.is_initialized())
        elif does == "meet":
            met = multihost_utils.process_allgather(jax.numpy.asarray([own + 10]))
            print("met", count, met.ravel().tolist())
        elif own == 1:
            raise FAILS[does](f"it is said that {does}")
        elif does != "last":
            time.sleep(60)  # as if in a collective that never comes to its end


if __name__ == "__main__":
    if "GCE_METADATA_IP" in os.environ:
        del os.environ["TPU_SKIP_MDS_QUERY"]  # JAX has set it: this machine has no TPU chips
    logging.set_verbosity(logging.INFO)
    try:
        main(*sys.argv[1:])
    except GkdjaxError as error:
        print(f"gkdjax: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
