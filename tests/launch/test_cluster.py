"""Processes find each other, notice that they are not the same, and end together.

Each test but the last ones needs several processes.
"""

import contextlib
import functools
import http.server
import shutil
import socket
import threading
import time

import pytest
from launch.together import MAIN, PROBE, ROOT, config_file, environment, free_port, run

from gkdjax.parallel import bootstrap
from gkdjax.utils.errors import UserError

SLOW = pytest.mark.slow(150)
GKE = {
    **{"JAX_FORCE_TPU_INIT": "1", "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1"},
    **{"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"},
}


def found_by(system: str, process: int, count: int, port: int = 0) -> dict[str, str]:
    """The environment that a step of Slurm has, a JobSet's pod on a host of a slice, or mpirun."""
    variables = {
        "slurm": {
            **{"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1"},
            **{"SLURM_NTASKS": count, "SLURM_PROCID": process, "SLURM_LOCALID": process},
        },
        "gke": GKE
        | {"TPU_WORKER_HOSTNAMES": ",".join(["127.0.0.1"] * count), "TPU_WORKER_ID": process},
        "open_mpi": {
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
            **{"OMPI_COMM_WORLD_SIZE": count, "OMPI_COMM_WORLD_RANK": process},
            "OMPI_COMM_WORLD_LOCAL_RANK": process,
        },
    }[system]
    variables["JAX_COORDINATOR_PORT"] = port or free_port()
    return environment(**{name: str(value) for name, value in variables.items()})


@contextlib.contextmanager
def tpu_vms(workers: int):
    """The environments of the TPU VMs of a slice: each has a metadata server of its own."""
    port = str(free_port())
    with contextlib.ExitStack() as servers:
        environments = []
        for worker in range(workers):
            values = {
                "agent-worker-number": str(worker),
                "worker-network-endpoints": ",".join(["unknown:unknown:127.0.0.1"] * workers),
                "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\n",
            }
            handler = functools.partial(Metadata, values)
            server = servers.enter_context(http.server.HTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            servers.callback(server.shutdown)
            own = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
            more = {"JAX_FORCE_TPU_INIT": "1", "JAX_COORDINATOR_PORT": port}
            environments.append(environment(**own, **more))
        yield environments


class Metadata(http.server.BaseHTTPRequestHandler):
    """Attributes of a machine, as Google's servers give them."""

    def __init__(self, values: dict[str, str], *connection):
        self._values = values
        super().__init__(*connection)

    def do_GET(self):
        value = self._values.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
        self.send_response(404 if value is None else 200)
        self.end_headers()
        self.wfile.write((value or "").encode())

    def log_message(self, *_):
        pass


def assert_met(ended: list) -> None:
    assert all(e.returncode == 0 and "met 2 [10, 11]" in e.stdout for e in ended), ended


def test_the_vms_of_a_tpu_slice_find_each_other():
    with tpu_vms(2) as environments:
        assert_met(run(*[[*PROBE, "meet"]] * 2, environments=environments))


@SLOW
@pytest.mark.parametrize("system", ["slurm", "gke", "open_mpi"])
def test_two_processes_find_each_other(system):
    port = free_port()
    environments = [found_by(system, process, 2, port) for process in range(2)]
    assert_met(run(*[[*PROBE, "meet"]] * 2, environments=environments))


@SLOW
def test_one_process_is_alone_with_all_devices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    with tpu_vms(1) as vm:
        alone = [found_by("slurm", 0, 1), found_by("gke", 0, 1), environment(), *vm]
        ended = run(*[[*PROBE, "alone"]] * 4, environments=[e | flags for e in alone])
    assert all("alone 1 3 False" in e.stdout for e in ended), ended


@SLOW
def test_flags_win_over_the_environment():
    where = f"127.0.0.1:{free_port()}", "2"
    commands = [[*PROBE, "meet", *where, str(i)] for i in range(2)]
    assert_met(run(*commands, environments=[found_by("slurm", 5, 9)] * 2))


@pytest.mark.parametrize(
    ("does", "code"),
    [("fail", 3), pytest.param("last", 3, marks=SLOW), pytest.param("bug", 1, marks=SLOW)],
)
def test_the_failure_of_one_process_ends_all_with_its_code(does, code):
    where = f"127.0.0.1:{free_port()}", "2"
    ended = run(*([*PROBE, does, *where, str(i)] for i in range(2)))
    assert [e.returncode for e in ended] == [code] * 2, ended
    other, failed = (e.stderr for e in ended)
    if does == "bug":  # an unexpected error has its traceback, where it was raised
        assert "RuntimeError: it is said that bug" in failed
        assert "Traceback" in failed and "Traceback" not in other
    else:
        assert f"gkdjax: it is said that {does}" in failed
    if does == "fail":
        assert "gkdjax: process 1 ended with 3: it is said that fail" in other


@pytest.fixture
def main(tmp_path):
    """main(flags of each process): how `gkdjax.main` ended, in each."""
    config = config_file(tmp_path / "job.py")
    common = [*MAIN, f"--config={config}", f"--workdir={tmp_path}/run"]

    def ended(*flags: list[str], **keywords) -> list:
        return run(*([*common, *own] for own in flags), **keywords)

    return ended


def where(process: int, port: int, timeout: int = 20) -> list[str]:
    flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={process}"]
    return [*flags, f"--coordinator_timeout_s={timeout}"]


@SLOW
@pytest.mark.parametrize("differs", ["config", "code"])
def test_a_difference_of_one_process_is_named_by_all(main, tmp_path, differs):
    port, flags, environments = free_port(), [], [environment()] * 2
    named = "config.train.seed (3 and not 0)"
    if differs == "config":
        flags = ["--config.train.seed=3"]
    else:
        other, named = tmp_path / "other", "gkdjax.losses/masking.py"
        ignored = shutil.ignore_patterns("assets")
        shutil.copytree(ROOT / "gkdjax", other / "gkdjax", ignore=ignored)
        with (other / "gkdjax" / "losses" / "masking.py").open("a") as file:
            file.write("# another line\n")
        environments[1] = environment(PYTHONPATH=str(other), PYTHONSAFEPATH="1")
    ended = main(where(0, port), [*where(1, port), *flags], environments=environments)
    for e in ended:
        assert e.returncode == 2
        assert f"process 1 differs from process 0 in {named}" in e.stderr


@SLOW
@pytest.mark.parametrize(
    ("process", "named"),
    [
        (1, "process 0 could not be reached at 127.0.0.1:{} within 2 s"),
        (0, "not all of the 2 processes met at 127.0.0.1:{} within 2 s"),
    ],
)
def test_a_process_that_does_not_come_is_exit_4_after_the_stated_time(main, process, named):
    port, begin = free_port(), time.monotonic()
    (ended,) = main(where(process, port, timeout=2))
    assert ended.returncode == 4 and 2 < time.monotonic() - begin < 20
    assert named.format(port) in ended.stderr


@SLOW
def test_a_taken_port_is_named(main):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (ended,) = main(where(0, port))
    assert ended.returncode == 2
    assert f"process 0 cannot listen at 127.0.0.1:{port}" in ended.stderr


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("127.0.0.1:9", None, 0), "--num_processes must be given"),
        ((None, 2, None), "--coordinator and --process_id must be given"),
        (("127.0.0.1", 2, 0), "HOST:PORT"),
        (("host:0", 2, 0), "HOST:PORT"),
        (("host:9", 2, 2), "--process_id=2, --num_processes=2"),
        (("host:9", 0, 0), "--num_processes=0"),
    ],
)
def test_flags_that_make_no_cluster_are_refused(given, named):
    with pytest.raises(UserError, match=named), bootstrap.joined(*given, timeout_s=1):
        pass


def test_a_difference_has_a_name_and_both_values():
    mine = {"a": {"b": 1, "c": [1, 2]}, "new": 1}
    theirs = {"a": {"b": 1, "c": [1, 3]}, "old": 1}
    found = list(bootstrap.differences(mine, theirs))
    assert found == ["a.c ([1, 2] and not [1, 3])", "new (missing there)", "old (only there)"]
