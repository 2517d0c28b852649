"""Scripts without a cloud: two local processes, and a job of Slurm; all of them are processes."""

import os
import re
import signal
import sys

import pytest
from launch.together import (
    LAUNCH,
    call,
    config_file,
    environment,
    executable,
    started,
    wait_for,
)

# Process 1 ends with 3; each with 75 if it is asked to stop.
STUB = f"""\
#!/bin/bash
if [[ $1 == -c ]]; then exec {sys.executable} "$@"; fi
trap 'exit 75' TERM
echo "$*" >>"$SAID"
if [[ -n ${{WAITS:-}} ]]; then while true; do sleep 0.05; done; fi
[[ $* == *--process_id=1* ]] && exit 3
exit 0
"""


@pytest.fixture
def stub(tmp_path) -> dict[str, str]:
    """The environment with an interpreter that records its arguments in tmp_path/said."""
    python = executable(tmp_path / "python", STUB)
    return environment(PYTHON=str(python), SAID=str(tmp_path / "said"))


def test_two_local_processes_form_a_cluster(tmp_path):
    config = config_file(tmp_path / "job.py", seed="os.getpid()")
    command = [LAUNCH / "local2.sh", f"--config={config}", f"--workdir={tmp_path}/run"]
    ended = call(command, environment(PYTHON=sys.executable))
    assert ended.returncode == 2
    assert ended.stderr.count("process 1 differs from process 0 in config.train.seed") == 2


def test_the_first_failure_is_the_code_of_both(tmp_path, stub):
    ended = call([LAUNCH / "local2.sh", "--config=a b"], stub)
    assert ended.returncode == 3 and ended.stderr == ""
    ports = re.findall(
        r"^-m gkdjax.main --coordinator=127.0.0.1:(\d+) --num_processes=2 --process_id=[01]"
        r" --config=a b$",
        (tmp_path / "said").read_text(),
        re.MULTILINE,
    )
    assert len(ports) == 2 and len(set(ports)) == 1


def test_both_are_asked_to_stop(tmp_path, stub):
    said = tmp_path / "said"
    with started([LAUNCH / "local2.sh", "--config=x"], stub | {"WAITS": "1"}) as process:
        wait_for(lambda: said.exists() and said.read_text().count("\n") == 2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 75


def test_the_other_is_stopped_when_one_was_killed(tmp_path, stub):
    one_dies = 'echo "$*" >>"$SAID"\n[[ $* == *--process_id=0* ]] && kill -KILL $$\n'
    executable(tmp_path / "python", STUB.replace('echo "$*" >>"$SAID"\n', one_dies))
    ended = call([LAUNCH / "local2.sh", "--config=x"], stub | {"WAITS": "1", "STOP_AFTER_S": "1"})
    assert ended.returncode == 137 and "process_id=1" in (tmp_path / "said").read_text()


@pytest.fixture
def slurm(tmp_path):
    """slurm(text of srun, ...) -> the environment of a job; scontrol records its arguments."""

    def make(srun: str, **more: str) -> dict[str, str]:
        executable(tmp_path / "bin" / "srun", f"#!/bin/bash\n{srun}")
        text = f'#!/bin/sh\necho scontrol "$*" >>{tmp_path / "said"}\n'
        executable(tmp_path / "bin" / "scontrol", text)
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        return environment(PATH=path, HOME="/home/me", SLURM_JOB_ID="77", **more)

    return make


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (3, 0, False), (75, 0, True), (143, 9, True), (75, 100, False)],
)
def test_a_job_goes_back_into_the_queue_if_it_is_to_be_continued(
    tmp_path, slurm, code, restarts, requeued
):
    said = tmp_path / "said"
    srun = f'echo srun "$*" >>{said}\nexit {code}\n'
    job = slurm(srun, SLURM_RESTART_COUNT=str(restarts))
    assert call(["bash", LAUNCH / "slurm.sbatch", "--config=x"], job).returncode == code
    first, *rest = said.read_text().splitlines()
    assert first == (
        "srun --kill-on-bad-exit=0 /home/me/gkdjax-venv/bin/python -m gkdjax.main --config=x"
    )
    assert rest == (["scontrol requeue 77"] if requeued else [])


def test_a_job_that_is_asked_to_go_waits_for_its_tasks(tmp_path, slurm):
    """Slurm asks the batch shell, too, where a whole job has to go."""
    begun = tmp_path / "begun"
    srun = f"trap 'sleep 0.3; exit 75' TERM\ntouch {begun}\nwhile true; do sleep 0.05; done\n"
    with started(["bash", LAUNCH / "slurm.sbatch", "--config=x"], slurm(srun)) as process:
        wait_for(begun.exists)
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 75
    assert (tmp_path / "said").read_text() == "scontrol requeue 77\n"


def test_the_job_is_asked_for_as_jax_needs_it():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", "\n".join(lines), re.MULTILINE))
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])  # Slurm stops at the first command
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] and "gpus-per-task" not in asked
    assert asked["signal"].startswith("TERM@")  # "B:" would be the shell alone
    assert "requeue" in asked and asked["open-mode"] == "append"
