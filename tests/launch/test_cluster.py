"""Processes find each other, notice that they are not the same, and end together."""

import contextlib
import functools
import http.server
import shutil
import socket
import threading
import time

import pytest
from launch.together import MAIN, PROBE, ROOT, environment, free_port, run

from gkdjax.parallel import bootstrap
from gkdjax.utils.errors import UserError

SLOW = pytest.mark.slow(150)
CONFIG = """\
from gkdjax import config

def get_config():
    c = config.default()
    c.student.model = "/no/such"
    c.data.train = [{"prompt": "a", "response": "b"}]
    return c
"""


def pair(*does: str) -> list:
    where = f"127.0.0.1:{free_port()}", "2"
    return run(*([*PROBE, *does, *where, str(i)] for i in range(2)))


def slurm(process: int, tasks: int, port: int = 0) -> dict[str, str]:
    """What a step of Slurm has in its environment, on a node of the name 127.0.0.1."""
    return environment(
        SLURM_JOB_ID="7",
        SLURM_STEP_NODELIST="127.0.0.1",
        SLURM_NTASKS=str(tasks),
        SLURM_PROCID=str(process),
        SLURM_LOCALID=str(process),
        JAX_COORDINATOR_PORT=str(port or free_port()),
    )


def gke(process: int, workers: int, port: int = 0) -> dict[str, str]:
    """What a JobSet's pod has in its environment, on each host of a slice."""
    return environment(
        JAX_FORCE_TPU_INIT="1",
        MEGASCALE_COORDINATOR_ADDRESS="127.0.0.1",
        MEGASCALE_NUM_SLICES="1",
        MEGASCALE_SLICE_ID="0",
        TPU_WORKER_HOSTNAMES=",".join(["127.0.0.1"] * workers),
        TPU_WORKER_ID=str(process),
        JAX_COORDINATOR_PORT=str(port or free_port()),
    )


def open_mpi(process: int, size: int, port: int = 0) -> dict[str, str]:
    return environment(
        OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://127.0.0.1:34911",
        OMPI_COMM_WORLD_SIZE=str(size),
        OMPI_COMM_WORLD_RANK=str(process),
        OMPI_COMM_WORLD_LOCAL_RANK=str(process),
        JAX_COORDINATOR_PORT=str(port or free_port()),
    )


@contextlib.contextmanager
def tpu_vms(workers: int):
    """The environments of the TPU VMs of a slice: each has a metadata server of its own."""
    port, servers = str(free_port()), []
    for worker in range(workers):
        values = {
            "agent-worker-number": str(worker),
            "worker-network-endpoints": ",".join(["unknown:unknown:127.0.0.1"] * workers),
            "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\n",
        }
        server = http.server.HTTPServer(("127.0.0.1", 0), functools.partial(Metadata, values))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
    try:
        yield [
            environment(
                JAX_FORCE_TPU_INIT="1",
                GCE_METADATA_IP=f"127.0.0.1:{server.server_port}",
                JAX_COORDINATOR_PORT=port,
            )
            for server in servers
        ]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


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


def test_the_vms_of_a_tpu_slice_find_each_other():
    with tpu_vms(2) as environments:
        ended = run(*[[*PROBE, "meet"]] * 2, environments=environments)
    assert all("met 2 [10, 11]" in e.stdout for e in ended), ended


@SLOW
@pytest.mark.parametrize("found_by", [slurm, gke, open_mpi])
def test_two_processes_find_each_other(found_by):
    port = free_port()
    ended = run(
        *[[*PROBE, "meet"]] * 2, environments=[found_by(process, 2, port) for process in range(2)]
    )
    assert [e.returncode for e in ended] == [0, 0], ended
    assert all("met 2 [10, 11]" in e.stdout for e in ended)


@SLOW
def test_one_process_is_alone_with_all_devices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    with tpu_vms(1) as vm:
        environments = [e | flags for e in (slurm(0, 1), gke(0, 1), environment(), *vm)]
        ended = run(*[[*PROBE, "alone"]] * 4, environments=environments)
    assert all("alone 1 3 False" in e.stdout for e in ended), ended


@SLOW
def test_what_is_given_wins_over_what_is_found():
    where = f"127.0.0.1:{free_port()}", "2"
    ended = run(
        *([*PROBE, "meet", *where, str(i)] for i in range(2)), environments=[slurm(5, 9)] * 2
    )
    assert all("met 2 [10, 11]" in e.stdout for e in ended), ended


def test_the_failure_of_one_process_ends_all_with_its_code():
    ended = pair("fail")
    assert [e.returncode for e in ended] == [3, 3], ended
    assert "gkdjax: process 1 ended with 3: it is said that fail" in ended[0].stderr
    assert "gkdjax: it is said that fail" in ended[1].stderr


@SLOW
def test_a_process_that_is_done_ends_with_the_code_of_one_that_fails_later():
    ended = pair("last")
    assert [e.returncode for e in ended] == [3, 3], ended


@SLOW
def test_an_unexpected_error_ends_all_with_1_and_is_told_with_its_traceback():
    ended = pair("bug")
    assert [e.returncode for e in ended] == [1, 1], ended
    assert "RuntimeError: it is said that bug" in ended[1].stderr
    assert "Traceback" in ended[1].stderr and "Traceback" not in ended[0].stderr


@pytest.fixture
def main(tmp_path):
    """main(flags of each process): how `gkdjax.main` ended, in each."""
    config = tmp_path / "job.py"
    config.write_text(CONFIG)
    common = [*MAIN, f"--config={config}", f"--workdir={tmp_path}/run"]

    def ended(*flags: list[str], **keywords) -> list:
        return run(*([*common, *own] for own in flags), **keywords)

    return ended


def where(process: int, port: int) -> list[str]:
    flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={process}"]
    return [*flags, "--coordinator_timeout_s=20"]


@SLOW
def test_another_config_in_one_process_is_named_by_all(main):
    port = free_port()
    ended = main(where(0, port), [*where(1, port), "--config.train.seed=3"])
    for e in ended:
        assert e.returncode == 2
        assert "process 1 differs from process 0 in config.train.seed (3 and not 0)" in e.stderr


@SLOW
def test_another_version_of_the_code_in_one_process_is_named_by_all(main, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "gkdjax", other / "gkdjax", ignore=shutil.ignore_patterns("assets"))
    with (other / "gkdjax" / "losses" / "masking.py").open("a") as file:
        file.write("# another line\n")
    environments = [environment(), environment(PYTHONPATH=str(other), PYTHONSAFEPATH="1")]
    port = free_port()
    ended = main(where(0, port), where(1, port), environments=environments)
    for e in ended:
        assert e.returncode == 2
        assert "process 1 differs from process 0 in gkdjax.losses/masking.py" in e.stderr


@SLOW
def test_a_coordinator_that_does_not_answer_is_exit_4_after_the_stated_time(main):
    port = free_port()
    begin = time.monotonic()
    (ended,) = main([*where(1, port), "--coordinator_timeout_s=2"])
    assert ended.returncode == 4 and 2 < time.monotonic() - begin < 20
    assert f"process 0 could not be reached at 127.0.0.1:{port} within 2 s" in ended.stderr


@SLOW
def test_a_process_that_does_not_come_is_exit_4_after_the_stated_time(main):
    port = free_port()
    (ended,) = main([*where(0, port), "--coordinator_timeout_s=2"])
    assert ended.returncode == 4
    assert f"not all of the 2 processes met at 127.0.0.1:{port} within 2 s" in ended.stderr


@SLOW
def test_a_taken_port_is_named(main):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (ended,) = main(where(0, port))
    assert ended.returncode == 2
    assert f"process 0 cannot listen at 127.0.0.1:{port}" in ended.stderr


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("127.0.0.1:9", None, 0), "--num_processes must be given"),
        ((None, 2, None), "--coordinator and --process_id must be given"),
        (("127.0.0.1", 2, 0), "HOST:PORT"),
        (("host:0", 2, 0), "HOST:PORT"),
        (("host:9", 2, 2), "--process_id=2, --num_processes=2"),
        (("host:9", 0, 0), "--num_processes=0"),
    ],
)
def test_flags_that_make_no_cluster_are_refused(given, told):
    with pytest.raises(UserError, match=told), bootstrap.joined(*given, timeout_s=1):
        pass


def test_a_difference_has_a_name_and_both_values():
    mine = {"a": {"b": 1, "c": [1, 2]}, "new": 1}
    theirs = {"a": {"b": 1, "c": [1, 3]}, "old": 1}
    found = list(bootstrap.differences(mine, theirs))
    assert found == [
        "a.c ([1, 2] and not [1, 3])",
        "new (missing there)",
        "old (only there)",
    ]
