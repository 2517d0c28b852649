"""The scripts for TPU VMs against a stand-in for gcloud whose VMs are two directories."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from launch.test_cluster import GKE
from launch.together import LAUNCH, ROOT, config_file, executable, free_port, started, wait_for

REAL = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
ENDS = '#!/bin/sh\nprintf "[%s]" "$HF_TOKEN" "$@"\nexit "$(cat "$STUB/code")"\n'
# Saves when it is asked to stop.
STOPS = "#!/bin/bash\ntrap 'echo saved; exit 75' TERM\necho begun\nwhile true; do sleep 0.1; done\n"


class Slice:
    """A slice of two VMs, and the scripts that are called for it."""

    def __init__(self, directory: pathlib.Path, python: str):
        self.directory, self._started = directory, contextlib.ExitStack()
        stub = pathlib.Path(__file__).with_name("stub_gcloud.py")
        text = f'#!/bin/sh\nexec {sys.executable} {stub} "$@"\n'
        binaries = executable(directory / "bin" / "gcloud", text).parent
        executable(directory / "python", python)
        self.set_environment()
        self._environment = {
            "PATH": f"{binaries}:/usr/bin:/bin",
            "HOME": str(directory),
            "STUB": str(directory),
            "SPOT_PAUSE_S": "0",
            **dict.fromkeys(("TPU_NAME", "TPU_ZONE", "TPU_TYPE", "TPU_RUNTIME"), "x"),
        }

    def set_environment(self, **variables: str) -> None:
        """Sets the variables of the VMs."""
        (self.directory / "environment.json").write_text(json.dumps(variables))

    def start(self, script: str, *arguments: str, **more: str) -> subprocess.Popen:
        command = [LAUNCH / script, *arguments]
        return self._started.enter_context(started(command, self._environment | more))

    def call(self, script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **more)
        output = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, *output)

    def close(self) -> None:
        """Nothing goes on, in the VMs neither."""
        self._started.close()
        for file in self.directory.glob("worker*/.gkdjax-run/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)

    def asked(self) -> list[str]:
        return (self.directory / "asked").read_text().split()


@pytest.fixture
def vms(tmp_path):
    """vms(the text of the VMs' interpreter): a `Slice`."""
    with contextlib.ExitStack() as open_ones:
        yield lambda python: open_ones.enter_context(contextlib.closing(Slice(tmp_path, python)))


@pytest.mark.slow(60)
def test_the_vms_of_a_slice_run_our_files_and_form_a_cluster(vms):
    ours = vms(REAL)
    hosts = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1"}
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    ours.set_environment(JAX_PLATFORMS="cpu", **GKE, **hosts, **port)
    assert ours.call("tpu_vm.sh", "create").returncode == 0
    set_up = ours.call("tpu_vm.sh", "setup")
    assert set_up.returncode == 0, set_up.stderr
    assert set_up.stdout.count("gkdjax-venv is as it should be") == 2
    for worker in range(2):
        home = ours.directory / f"worker{worker}" / "gkdjax"
        assert (home / "gkdjax" / "main.py").is_file()
        config_file(home / "job.py", seed='int(os.environ["TPU_WORKER_ID"])')
    ran = ours.call("tpu_vm.sh", "run", "--config=job.py", "--workdir=a b")
    assert ran.returncode == 2, ran
    differs = "process 1 differs from process 0 in config.train.seed (1 and not 0)"
    assert ran.stdout.count(f"gkdjax: {differs}") == 2


def test_a_run_outlives_its_connection_and_can_be_shown_and_stopped(vms):
    ours = vms(STOPS)
    ours.call("tpu_vm.sh", "create")
    ours.call("tpu_vm.sh", "setup")
    begun = [ours.directory / f"worker{i}" / ".gkdjax-run" / "log" for i in range(2)]
    first = ours.start("tpu_vm.sh", "run", "--config=x")
    wait_for(lambda: all(log.exists() and "begun" in log.read_text() for log in begun))
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=10)
    second = ours.start("tpu_vm.sh", "run", "--config=x")
    # It shows both before they are stopped, or it would start them once more.
    assert [second.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
    stopped = ours.call("tpu_vm.sh", "stop")
    assert stopped.returncode == 0, stopped.stderr
    shown, _ = second.communicate(timeout=30)
    assert second.returncode == 75
    assert shown.count("begun") == 0 and shown.count("saved") == 2
    assert ours.call("tpu_vm.sh", "stop").returncode == 0  # nothing runs any more


def test_keys_reach_the_run_and_no_command_line(vms):
    ours = vms(ENDS)
    (ours.directory / "code").write_text("0")
    keys = ours.directory / "keys"
    keys.write_text("HF_TOKEN=s3cret\n")
    keys.chmod(0o600)
    ours.call("tpu_vm.sh", "create")
    ours.call("tpu_vm.sh", "setup", TPU_KEYS=str(keys))
    sent = ours.directory / "worker1" / "gkdjax-keys"
    assert sent.read_text() == "HF_TOKEN=s3cret\n" and sent.stat().st_mode & 0o77 == 0
    ran = ours.call("tpu_vm.sh", "run", "--config=x", "--config.train.seed=1 2")
    assert ran.stdout.count("[s3cret][-m][gkdjax.main][--config=x][--config.train.seed=1 2]") == 2
    sent.chmod(0o644)
    assert "chmod 600" in ours.call("tpu_vm.sh", "run", "--config=x").stderr


@pytest.mark.parametrize(
    ("ends", "code", "created", "tries"),
    [
        (["75", "lost", "0"], 0, 2, 9),
        (["lost 4", "0"], 0, 2, 9),
        (["4"], 4, 1, 9),
        (["75", "2"], 2, 1, 9),
        (["3"], 3, 1, 9),
        (["1"], 1, 1, 9),
        (["75", "137"], 137, 1, 2),
    ],
)
def test_the_loop_goes_on_as_long_as_that_can_help(vms, ends, code, created, tries):
    ours = vms(ENDS)
    (ours.directory / "ends").write_text("\n".join(ends))
    arguments = "--config=x", "--workdir=/mnt/gkdjax/x"
    looped = ours.call("tpu_spot_loop.sh", *arguments, SPOT_TRIES=str(tries))
    assert looped.returncode == code, looped.stderr
    assert (ours.directory / "ends").read_text() == ""
    assert ours.asked().count("create") == created
    assert ours.asked().count("delete") == created - 1  # what is left of one that was lost
    assert f"ended with {code}" in looped.stderr


def test_mistakes_before_the_run_are_not_tried_again(vms):
    ours = vms(ENDS)
    looped = ours.call("tpu_spot_loop.sh", "--config=x")  # its directory would go with the VMs
    assert looped.returncode == 2 and "set --workdir" in looped.stderr
    assert not (ours.directory / "asked").exists()
    looped = ours.call("tpu_spot_loop.sh", "--workdir=x", TPU_KEYS="/no/such")
    assert looped.returncode == 2 and ours.asked() == ["describe", "create"]


def test_a_machine_is_set_up_once_until_something_changes(tmp_path):
    made = (
        '#!/bin/bash\necho "$*" >>"$HOME/calls"\n'
        'if [[ $1 == -m && $2 == venv ]]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\n'
    )
    python = executable(tmp_path / "bin" / "python3.13", made)
    environment = os.environ | {"HOME": str(tmp_path), "PATH": f"{python.parent}:/usr/bin:/bin"}
    for accelerator, installed in (("cpu", 1), ("cpu", 1), ("tpu", 2)):
        command = [LAUNCH / "worker_setup.sh", accelerator]
        subprocess.run(command, env=environment, check=True, timeout=60)
        calls = (tmp_path / "calls").read_text()
        assert calls.count("pip install") == installed
    assert f"--constraint {LAUNCH}/pins.txt --editable {ROOT}[tpu]" in calls
