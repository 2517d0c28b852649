"""The launch scripts: their printed commands, wrong calls, and the pins."""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from launch.test_lock import asked_for
from launch.together import LAUNCH
from packaging.utils import canonicalize_name

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
GOLDEN = pathlib.Path(__file__).parent / "golden"
TPU = {
    "HOME": "/home/me",
    "TPU_NAME": "bake",
    "TPU_ZONE": "us-west4-a",
    "TPU_TYPE": "v5litepod-16",
    "TPU_RUNTIME": "v2-alpha-tpuv5-lite",
    "TPU_NFS": "10.0.0.2:/share",
    "PATH": "/usr/bin:/bin",
}
RUN = ["--config=configs/gemma3.py", "--workdir=/mnt/gkdjax/a b", "--config.data.train=it's"]
PRINTED = {
    "create": ["tpu_vm.sh", "create", "--print"],
    "setup": ["tpu_vm.sh", "setup", "--print"],
    "run": ["tpu_vm.sh", "run", "--print", *RUN],
    "logs": ["tpu_vm.sh", "logs", "--print"],
    "stop": ["tpu_vm.sh", "stop", "--print"],
    "delete": ["tpu_vm.sh", "delete", "--print"],
    "spot": ["tpu_spot_loop.sh", "--print", *RUN],
}


def call(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [LAUNCH / script, *arguments],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nowhere"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_shellcheck_finds_nothing():
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_script_stops_at_errors_and_can_be_started(script):
    assert "\nset -euo pipefail\n" in script.read_text()
    assert script.suffix == ".sbatch" or script.stat().st_mode & 0o111


@pytest.mark.parametrize("name", PRINTED)
def test_what_is_printed_is_what_it_was(name):
    printed = call(*PRINTED[name], **TPU)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == (GOLDEN / f"{name}.txt").read_text()


def test_keys_are_sent_to_a_file_that_nobody_else_can_read(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("HF_TOKEN=secret")
    keys.chmod(0o600)
    sent = call("tpu_vm.sh", "setup", "--print", **TPU, TPU_KEYS=str(keys))
    made, filled = sent.stdout.splitlines()[1:3]
    assert "touch gkdjax-keys && chmod 600 gkdjax-keys" in made
    assert f"scp {keys} bake:gkdjax-keys" in filled and "secret" not in sent.stdout
    keys.chmod(0o640)
    refused = call("tpu_vm.sh", "setup", "--print", **TPU, TPU_KEYS=str(keys))
    assert refused.returncode == 2 and f"chmod 600 {keys}" in refused.stderr


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="needs gcloud, whose parser is asked")
def test_gcloud_knows_every_flag(tmp_path):
    """The real gcloud's parser says so of each command line, without a network."""
    printed = [call(*command, **TPU).stdout for command in PRINTED.values()]
    lines = sorted({line for text in printed for line in text.splitlines()})
    state = "gcloud compute tpus tpu-vm describe bake --zone=us-west4-a '--format=value(state)'"
    wrong = "gcloud compute tpus tpu-vm delete bake --zon=us-west4-a"
    commands = tmp_path / "commands.json"
    commands.write_text(json.dumps([{"command_string": line} for line in (*lines, state, wrong)]))
    ended = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={commands}"],
        env={"PATH": TPU["PATH"], "HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    *found, of_wrong = json.loads(ended.stdout)
    assert len(found) == len(lines) + 1 >= 8
    assert [f["error_message"] for f in found if not f["success"]] == []
    assert "--zon" in of_wrong["error_message"]
    text = (LAUNCH / "tpu_spot_loop.sh").read_text()
    asked = shlex.split(re.search(r"gcloud (compute .*) \|\| true", text)[1])
    assert asked[:4] == ["compute", "tpus", "tpu-vm", "describe"]  # as it was checked
    assert asked[4:] == ["$TPU_NAME", "--zone=$TPU_ZONE", "--format=value(state)"]


WITHOUT = {
    missing: {name: value for name, value in TPU.items() if name != missing}
    for missing in ("TPU_TYPE", "TPU_RUNTIME", "TPU_ZONE")
}


@pytest.mark.parametrize(
    ("command", "variables", "named"),
    [
        ("tpu_vm.sh", {}, "usage: launch/tpu_vm.sh"),
        ("tpu_vm.sh start", {}, "usage: launch/tpu_vm.sh"),
        ("tpu_vm.sh stop now", {}, "usage: launch/tpu_vm.sh"),
        ("tpu_vm.sh logs --print", {}, "set TPU_NAME"),
        *(("tpu_vm.sh create --print", less, f"set {name}") for name, less in WITHOUT.items()),
        ("tpu_spot_loop.sh", {}, "usage: launch/tpu_spot_loop.sh"),
        ("tpu_spot_loop.sh --config=x", {}, "set TPU_NAME"),
        ("worker_setup.sh gpu", {}, "usage: launch/worker_setup.sh"),
        ("worker_run.sh", {}, "usage: launch/worker_run.sh"),
        ("local2.sh", {}, "usage: launch/local2.sh"),
        ("teacher_vllm.sh model name 8000", {}, "usage: launch/teacher_vllm.sh"),
        ("teacher_vllm.sh model name port -- true", {}, "the port is 'port'"),
        ("start_vllm.sh model", {}, "usage: launch/start_vllm.sh"),
        ("install_vllm_cpu.sh", {}, "usage: launch/install_vllm_cpu.sh"),
    ],
)
def test_a_wrong_call_is_exit_2_and_says_what_to_do(command, variables, named, tmp_path):
    ended = call(*command.split(), **{"HOME": str(tmp_path)} | variables)
    assert ended.returncode == 2 and named in ended.stderr


@pytest.mark.parametrize("cpu", [True, False])
def test_prompts_are_read_in_one_piece_on_a_cpu_alone(cpu):
    """On a CPU the engine was seen to end without it; whole prompts need room for the longest."""
    arguments = [*["--cpu"][:cpu], "model", "m", "1", "--x"]
    printed = call("start_vllm.sh", *arguments, VLLM_PYTHON="echo").stdout
    assert ("--no-enable-chunked-prefill" in printed) == cpu
    assert ("--max-num-batched-tokens" in printed) != cpu
    assert printed.endswith("--x\n")


def test_every_direct_requirement_is_pinned():
    lines = (LAUNCH / "pins.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    names = {canonicalize_name(requirement.name) for requirement in asked_for()[0]}
    assert {"jax", "flax"} <= names and {"jaxlib", "libtpu", *names} <= set(pins)
    assert all(re.fullmatch(r"[0-9][\w.]*", version) for version in pins.values())
