"""Scripts without a cloud: two local processes, and a job of Slurm."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from launch.together import ROOT, environment

LAUNCH = ROOT / "launch"
# Ends with its process id times three, or, asked to stop, with 75.
STUB = """\
#!/bin/bash
if [[ $1 == -c ]]; then exec {python} "$@"; fi
trap 'exit 75' TERM
echo "$*" >>"$SAID"
if [[ -n ${{WAITS:-}} ]]; then while true; do sleep 0.05; done; fi
[[ $* == *--process_id=1* ]] && exit 3
exit 0
"""
CONFIG = """\
import os
from gkdjax import config

def get_config():
    c = config.default()
    c.student.model = "/no/such"
    c.data.train = [{"prompt": "a", "response": "b"}]
    c.train.seed = os.getpid()
    return c
"""


def executable(file: pathlib.Path, text: str) -> pathlib.Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


@contextlib.contextmanager
def started(command: list, **variables: str):
    """A process in a group of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        [str(part) for part in command],
        env=environment(**variables),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def call(command: list, **variables: str) -> subprocess.CompletedProcess:
    with started(command, **variables) as process:
        output = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, *output)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_local_processes_form_a_cluster(tmp_path):
    (tmp_path / "job.py").write_text(CONFIG)
    command = [LAUNCH / "local2.sh", f"--config={tmp_path}/job.py", f"--workdir={tmp_path}/run"]
    ended = call(command, PYTHON=sys.executable)
    assert ended.returncode == 2
    assert ended.stderr.count("process 1 differs from process 0 in config.train.seed") == 2


def test_the_first_failure_is_the_code_of_both(tmp_path):
    python = executable(tmp_path / "python", STUB.format(python=sys.executable))
    said = tmp_path / "said"
    ended = call([LAUNCH / "local2.sh", "--config=a b"], PYTHON=str(python), SAID=str(said))
    assert ended.returncode == 3 and ended.stderr == ""
    ports = re.findall(
        r"^-m gkdjax.main --coordinator=127.0.0.1:(\d+) --num_processes=2 --process_id=[01]"
        r" --config=a b$",
        said.read_text(),
        re.MULTILINE,
    )
    assert len(ports) == 2 and len(set(ports)) == 1


def test_both_are_asked_to_stop(tmp_path):
    python = executable(tmp_path / "python", STUB.format(python=sys.executable))
    said = tmp_path / "said"
    command = [LAUNCH / "local2.sh", "--config=x"]
    with started(command, PYTHON=str(python), SAID=str(said), WAITS="1") as process:
        wait_for(lambda: said.exists() and said.read_text().count("\n") == 2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 75


def test_the_other_is_stopped_when_one_was_killed(tmp_path):
    one_dies = 'echo "$*" >>"$SAID"\n[[ $* == *--process_id=0* ]] && kill -KILL $$\n'
    text = STUB.format(python=sys.executable).replace('echo "$*" >>"$SAID"\n', one_dies)
    python = executable(tmp_path / "python", text)
    variables = {"SAID": str(tmp_path / "said"), "WAITS": "1", "STOP_AFTER_S": "1"}
    ended = call([LAUNCH / "local2.sh", "--config=x"], PYTHON=str(python), **variables)
    assert ended.returncode == 137 and "process_id=1" in (tmp_path / "said").read_text()


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (3, 0, False), (75, 0, True), (143, 9, True), (75, 100, False)],
)
def test_a_job_goes_back_into_the_queue_if_it_is_to_be_continued(
    tmp_path, code, restarts, requeued
):
    """srun and scontrol are stand-ins."""
    said = tmp_path / "said"
    executable(tmp_path / "bin" / "srun", f'#!/bin/sh\necho srun "$*" >>{said}\nexit {code}\n')
    executable(tmp_path / "bin" / "scontrol", f'#!/bin/sh\necho scontrol "$*" >>{said}\n')
    ended = call(
        ["bash", LAUNCH / "slurm.sbatch", "--config=x"],
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
        HOME="/home/me",
        SLURM_JOB_ID="77",
        SLURM_RESTART_COUNT=str(restarts),
    )
    assert ended.returncode == code
    first, *rest = said.read_text().splitlines()
    assert first == (
        "srun --kill-on-bad-exit=0 /home/me/gkdjax-venv/bin/python -m gkdjax.main --config=x"
    )
    assert rest == (["scontrol requeue 77"] if requeued else [])


def test_a_job_that_is_asked_to_go_waits_for_its_tasks(tmp_path):
    """Slurm asks the batch shell, too, where a whole job has to go."""
    begun, said = tmp_path / "begun", tmp_path / "said"
    srun = f"#!/bin/bash\ntrap 'sleep 0.3; exit 75' TERM\ntouch {begun}\n"
    executable(tmp_path / "bin" / "srun", srun + "while true; do sleep 0.05; done\n")
    executable(tmp_path / "bin" / "scontrol", f'#!/bin/sh\necho "$*" >>{said}\n')
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    command = ["bash", LAUNCH / "slurm.sbatch", "--config=x"]
    with started(command, PATH=path, SLURM_JOB_ID="77") as process:
        wait_for(begun.exists)
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 75 and said.read_text() == "requeue 77\n"


def test_the_job_is_asked_for_as_jax_needs_it():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", "\n".join(lines), re.MULTILINE))
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])  # Slurm stops at the first command
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] and "gpus-per-task" not in asked
    assert asked["signal"].startswith("TERM@")  # "B:" would be the shell alone
    assert "requeue" in asked and asked["open-mode"] == "append"
