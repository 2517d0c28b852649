"""The YAML files of GKE and SkyPilot: what their codes, secrets and commands say."""

import re
import shlex
import subprocess

import pytest
import yaml
from launch.test_readme import assert_main_takes
from launch.together import LAUNCH, environment, executable

from gkdjax.utils.errors import (
    CoordinatorUnreachable,
    Preempted,
    TeacherUnreachable,
    TrainingFailure,
)

AGAIN = {Preempted.exit_code, TeacherUnreachable.exit_code, CoordinatorUnreachable.exit_code}
SKY = ["sky_tpu.yaml", "sky_gpu.yaml"]


def load(name: str) -> dict:
    return yaml.safe_load((LAUNCH / name).read_text())


@pytest.fixture(scope="module")
def jobset() -> dict:
    return load("gke_jobset.yaml")


@pytest.fixture(scope="module")
def job(jobset) -> dict:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_a_jobset_stops_where_a_person_has_to_look_and_begins_again_elsewhere(jobset, job):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (pods,) = job["podFailurePolicy"]["rules"]
    assert pods["action"] == "FailJob" and pods["onExitCodes"]["operator"] == "In"
    codes = set(pods["onExitCodes"]["values"])
    assert {2, TrainingFailure.exit_code} <= codes and not codes & AGAIN
    assert job["backoffLimit"] == 0  # else a pod would begin again without the others
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy is refused with any other
    assert [c["name"] for c in pod["containers"]] == [pods["onExitCodes"]["containerName"]]


def test_a_jobset_has_a_pod_for_each_vm_of_its_slice(job):
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    assert job["completionMode"] == "Indexed"
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
    (workdir,) = [a for a in container["command"] if a.startswith("--workdir=")]
    assert workdir.partition("=")[2].startswith(mounted["runs"] + "/")


def test_secrets_are_named_and_not_written(job):
    (container,) = job["template"]["spec"]["containers"]
    assert {"HF_TOKEN", "TEACHER_KEY"} == {variable["name"] for variable in container["env"]}
    assert all("secretKeyRef" in variable["valueFrom"] for variable in container["env"])
    for name in SKY:
        assert load(name)["secrets"] == {"HF_TOKEN": None}


@pytest.mark.parametrize("name", SKY)
def test_a_sky_task_is_continued_after_75(name):
    task = load(name)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [Preempted.exit_code]
    assert task["resources"]["use_spot"] is True and task["workdir"] == "."
    (mounted,) = task["file_mounts"]
    assert task["file_mounts"][mounted]["mode"] == "MOUNT"
    assert f"--workdir={mounted}/" in task["run"]
    script, accelerator = shlex.split(task["setup"])
    assert script == "launch/worker_setup.sh" and accelerator in ("tpu", "cuda12")


def test_a_sky_task_of_several_machines_says_who_is_who(tmp_path):
    executable(tmp_path / "gkdjax-venv/bin/python", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    sky = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    said = subprocess.run(
        ["bash", "-euc", load("sky_gpu.yaml")["run"]],
        env=environment(HOME=str(tmp_path), **sky),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said[:5] == [
        *("-m", "gkdjax.main", "--coordinator=10.0.0.1:8476"),
        *("--num_processes=2", "--process_id=1"),
    ]


def commands() -> list[list[str]]:
    """Every call of gkdjax.main in the YAML files, without the arguments that a shell fills in."""
    job = load("gke_jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    texts = [shlex.join(container["command"]), *(load(name)["run"] for name in SKY)]
    texts += re.findall(r'--command="(.*)"', (LAUNCH / "gke_jobset.yaml").read_text())
    found = []
    for text in texts:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
        rest = words[words.index("gkdjax.main") + 1 :]
        found.append([word for word in rest if "$" not in word])
    return found


def test_gkdjax_main_takes_every_command():
    assert len(commands()) == 4
    for command in commands():
        assert_main_takes(command)
        assert any(word.startswith("--workdir=") for word in command)
