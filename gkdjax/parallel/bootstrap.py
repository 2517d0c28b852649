"""How the processes of a run find each other, and whether they are about to run the same thing.

Nothing here touches a device: it is done before JAX's backend is made.
"""

import atexit
import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

# JAX has no public way to ask who is there before it connects, nor to its store of keys. Orbax
# reaches for the same two.
from jax._src import clusters, distributed

from gkdjax.parallel import shutdown
from gkdjax.utils.errors import CoordinatorUnreachable, UserError, one_line
from gkdjax.utils.text import cut, some

_RETRY_S = 0.5
_LEAST_WAIT_S = 1.0
_HEARTBEATS_S = 100, 10**9  # JAX's own time, after which it aborts those that miss one; the most
_JAX_ABORTS_LATER_S = 60  # at its own deadline JAX aborts the process; ours has to come first


class Place(NamedTuple):
    """Where a process stands in its cluster."""

    coordinator: str  # HOST:PORT at which process 0 listens
    processes: int  # how many there are
    process: int  # which one this is
    devices: list[int] | None = None  # those of this machine that are its own; None: all


@contextlib.contextmanager
def joined(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    timeout_s: float,
    silent_s: float | None = None,
) -> Iterator[int]:
    """A run's time in its cluster -> the number of processes.

    `silent_s`: JAX aborts the others only twice so long after a process has stopped, since they are
    to end by themselves before (`train.watchdog`); None: after the 100 s of its own.

    What is given, all three as in `Place`, wins; else JAX looks for a cluster (TPU metadata, Slurm,
    Open MPI). Alone, nothing is connected. In a cluster, a process that ends with an error ends
    all, see `parallel.shutdown`.

    Raises:
      UserError: the three do not go together.
      CoordinatorUnreachable: not all processes came in time, or process 0 could not be reached.
    """
    deadline = time.monotonic() + timeout_s
    place = _given(coordinator, processes, process) or _detected(timeout_s)
    if place is None or place.processes == 1:
        yield 1
        return
    logging.info("process %d of %d, at %s", place.process, place.processes, place.coordinator)
    try:
        _connect(place, deadline, timeout_s, silent_s)
    except BaseException as error:
        # JAX, half connected, would not let it end.
        atexit.register(shutdown.leave, shutdown.exit_code(error))
        raise
    with shutdown.together(distributed.global_state.client, place.process, place.processes):
        yield place.processes


def require_same(named: dict[str, Any], timeout_s: float) -> None:
    """Returns when every process has been found to have the same JSON values as process 0.

    Raises:
      UserError: in all processes, naming those that differ, and in what.
      CoordinatorUnreachable: a process did not come in time.
    """
    client, process = distributed.global_state.client, distributed.global_state.process_id
    if client is None:
        return
    within = int(timeout_s * 1000)
    try:
        if process == 0:
            client.key_value_set("gkdjax/same/0", json.dumps(named))
        theirs = json.loads(client.blocking_key_value_get("gkdjax/same/0", within))
        found = list(differences(json.loads(json.dumps(named)), theirs))
        if found:
            client.key_value_set(f"gkdjax/differs/{process}", some(found))
        client.wait_at_barrier("gkdjax/same", within)
    except jax.errors.JaxRuntimeError as error:
        raise CoordinatorUnreachable(
            f"not all processes told within {timeout_s:g} s what they run; one of them may have"
            f" ended, or have another gkdjax: {one_line(error)}"
        ) from None
    differing = [
        f"process {key.rpartition('/')[2]} differs from process 0 in {names}"
        for key, names in client.key_value_dir_get("gkdjax/differs/")
    ]
    if differing:
        raise UserError(
            f"{some(differing)}. All processes of a run need the same config and the same code"
        )


def code() -> dict[str, Any]:
    """Versions and hashes of every source file, which `require_same` compares beside the config."""
    package = pathlib.Path(__file__).parents[1]
    files = {
        str(file.relative_to(package)): hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        for file in sorted(package.rglob("*.py"))
    }
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return {"version": versions, "gkdjax": files}


def differences(mine: Any, theirs: Any, name: str = "") -> Iterator[str]:
    """ "config.train.seed (1 and not 0)", for each place at which two JSON values differ."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted({*mine, *theirs}):
            below = f"{name}.{key}" if name else key
            if key in mine and key in theirs:
                yield from differences(mine[key], theirs[key], below)
            else:
                yield f"{below} ({'missing there' if key in mine else 'only there'})"
    elif mine != theirs:
        yield f"{name} ({cut(json.dumps(mine), 60)} and not {cut(json.dumps(theirs), 60)})"


def _given(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    """The place that the three flags name."""
    three = {"--coordinator": coordinator, "--num_processes": processes, "--process_id": process}
    missing = [flag for flag, value in three.items() if value is None]
    if len(missing) == len(three):
        return None
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given as well: all of {[*three]} or none")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator!r} has to be HOST:PORT, of process 0")
    if processes < 1 or not 0 <= process < processes:
        raise UserError(
            f"--process_id={process}, --num_processes={processes}: numbers go from 0 to one less"
            " than there are processes"
        )
    return Place(coordinator, processes, process)


def _detected(timeout_s: float) -> Place | None:
    """The place that JAX finds; None where it sees no cluster."""
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(timeout_s)
        )
    except Exception as error:  # of metadata servers, name servers, Kubernetes, variables
        raise CoordinatorUnreachable(
            f"a cluster was found, but not its process 0: {type(error).__name__}:"
            f" {one_line(error)}. --coordinator, --num_processes and --process_id name it"
        ) from error
    return None if found[0] is None else Place(*found)


def _connect(place: Place, deadline: float, timeout_s: float, silent_s: float | None) -> None:
    """Connects this process with all others."""
    host, _, port = place.coordinator.rpartition(":")
    within = host == "localhost" or host.startswith("127.")  # this machine: not open to others
    listening = place.coordinator if within else f"[::]:{port}"
    listening = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or listening
    if place.process:
        _reach(place.coordinator, deadline, timeout_s)
    else:
        _require_free(listening)
    # It would catch SIGTERM while the run does not listen to it yet, and the signal were lost.
    jax.config.update("jax_enable_preemption_service", False)
    left = max(deadline - time.monotonic(), _LEAST_WAIT_S)
    failed = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                *place[:3],
                local_device_ids=place.devices,
                cluster_detection_method="deactivate",
                initialization_timeout=int(left) + _JAX_ABORTS_LATER_S,
                coordinator_bind_address=listening,
                heartbeat_timeout_seconds=int(np.clip(2 * (silent_s or 0.0), *_HEARTBEATS_S)),
            )
        except Exception as error:  # handed to the thread that waits
            failed.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(left)
    if failed:
        raise failed[0]
    if thread.is_alive():
        raise CoordinatorUnreachable(
            f"not all of the {place.processes} processes met at {place.coordinator} within"
            f" {timeout_s:g} s; look for one that was not started, or ended before"
        )


def _reach(coordinator: str, deadline: float, timeout_s: float) -> None:
    """Returns when somebody listens there."""
    host, _, port = coordinator.rpartition(":")
    while True:
        left = max(deadline - time.monotonic(), _LEAST_WAIT_S)
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left):
                return
        except OSError as error:
            if time.monotonic() + _RETRY_S > deadline:
                raise CoordinatorUnreachable(
                    f"process 0 could not be reached at {coordinator} within {timeout_s:g} s"
                    f" ({error}); is it running, and is the port open between the machines?"
                ) from error
            time.sleep(_RETRY_S)


def _require_free(address: str) -> None:
    """Raises UserError if process 0 cannot listen there, where JAX may crash."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), int(port)), family=family).close()
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at {address}, for the others to find it: {error}"
        ) from error
