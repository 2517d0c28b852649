"""launch/teacher_vllm.sh with a stand-in for vLLM: a run beside its teacher."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from launch.together import ROOT, free_port

SCRIPT = ROOT / "launch" / "teacher_vllm.sh"
STUB = pathlib.Path(__file__).with_name("stub_vllm.py")
TRAINER = 'echo "share $XLA_PYTHON_CLIENT_MEM_FRACTION"; exit "$0"'


class Beside:
    """The script, its server and what they leave in a directory."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        python = directory / "vllm_python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {STUB} "$@"\n')
        python.chmod(0o755)
        self.port = free_port()
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "STUB_DIR": str(directory),
            "VLLM_PYTHON": str(python),
            "TEACHER_LOG": str(directory / "log"),
        }

    def start(self, ends: str | list[str], *arguments: str, **more: str) -> subprocess.Popen:
        """`ends` is the code of a command that does little, or another command."""
        command = ["bash", "-c", TRAINER, ends] if isinstance(ends, str) else ends
        return subprocess.Popen(
            [SCRIPT, "model", "teacher", str(self.port), *arguments, "--", *command],
            env=self._environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(
        self, ends: str | list[str], *arguments: str, **more: str
    ) -> subprocess.CompletedProcess:
        with self.start(ends, *arguments, **more) as process:
            try:
                output = process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()  # else leaving it would wait for ever
                raise
        return subprocess.CompletedProcess(SCRIPT, process.returncode, *output)

    def answers(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def server(self) -> dict:
        return json.loads((self.directory / "started").read_text())

    def key_file(self, mode: int, text: str = "s3cret\n") -> str:
        file = self.directory / "key"
        file.write_text(text)
        file.chmod(mode)
        return str(file)


@pytest.fixture
def beside(tmp_path):
    ours = Beside(tmp_path)
    yield ours
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # only after a failure
        os.killpg(ours.server()["processes"][0], signal.SIGKILL)


def wait_for(file: pathlib.Path) -> None:
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_all_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + 5
    for process in processes:
        while pathlib.Path(f"/proc/{process}").exists():
            state = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":  # an orphan that nobody has asked about yet
                break
            assert time.monotonic() < deadline, f"{process} is still there"
            time.sleep(0.05)


def test_the_command_runs_beside_a_server_that_answers(beside):
    health = f"urllib.request.urlopen('http://127.0.0.1:{beside.port}/health').status"
    run = f"import os, sys, urllib.request; print({health}, os.environ['TEACHER_KEY'],"
    run += " os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'], 'VLLM_API_KEY' in os.environ)"
    ended = beside.call(
        [sys.executable, "-c", run + "; sys.exit(7)"],
        *("--max-model-len", "512"),
        TEACHER_KEY_FILE=beside.key_file(0o600),
        TEACHER_KEY_ENV="TEACHER_KEY",
        STUB_DELAY_S="1",
    )
    assert ended.returncode == 7, ended.stderr
    assert ended.stdout == "200 s3cret 0.4 False\n"
    text = " ".join(beside.server()["arguments"])
    assert beside.server()["key"] == "s3cret" and "s3cret" not in text
    assert text.endswith("--max-model-len 512 --gpu-memory-utilization 0.45")
    assert "--host 127.0.0.1" in text and "--max-logprobs 64" in text
    assert not beside.answers()


def test_the_command_is_asked_to_stop_and_the_server_goes_after_it(beside):
    health = f"127.0.0.1:{beside.port}/health"
    begun = beside.directory / "begun"
    run = f"trap 'curl -s {health} && echo still there; exit 75' TERM; touch {begun};"
    process = beside.start(["bash", "-c", run + " while true; do sleep 0.05; done"])
    wait_for(begun)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and shown == "still there\n"
    assert not beside.answers()


def test_memory_is_shared_unless_somebody_has_said_how(beside):
    ended = beside.call("0", "--max-model-len", "4096")
    arguments = beside.server()["arguments"]
    assert arguments[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert arguments[-4:] == ["--max-model-len", "4096", "--gpu-memory-utilization", "0.45"]
    assert "share 0.4\n" in ended.stdout and beside.server()["gpus"] is None
    ended = beside.call("0", "--gpu-memory-utilization", "0.6", XLA_PYTHON_CLIENT_MEM_FRACTION=".3")
    assert beside.server()["arguments"][-2:] == ["--gpu-memory-utilization", "0.6"]
    assert "0.45" not in beside.server()["arguments"] and "share .3\n" in ended.stdout


def test_a_server_with_gpus_of_its_own_shares_nothing(beside):
    ended = beside.call("0", TEACHER_GPUS="1")
    assert beside.server()["gpus"] == "1" and "0.45" not in beside.server()["arguments"]
    assert "share \n" in ended.stdout


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_key_that_others_can_read_is_refused(beside, mode):
    key = beside.key_file(mode)
    ended = beside.call("0", TEACHER_KEY_FILE=key, TEACHER_KEY_ENV="TEACHER_KEY")
    assert ended.returncode == 2 and f"chmod 600 {key}" in ended.stderr
    assert not (beside.directory / "started").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"TEACHER_KEY_FILE": "/no/such", "TEACHER_KEY_ENV": "A"}, "is no file"),
        ({"TEACHER_KEY_FILE": "key"}, "set TEACHER_KEY_ENV"),
    ],
)
def test_half_a_key_is_refused(beside, more, told):
    ended = beside.call("0", **more)
    assert ended.returncode == 2 and told in ended.stderr


def test_an_empty_key_is_refused(beside):
    key = beside.key_file(0o600, "\n")
    ended = beside.call("0", TEACHER_KEY_FILE=key, TEACHER_KEY_ENV="TEACHER_KEY")
    assert ended.returncode == 2 and "is empty" in ended.stderr


def test_a_server_that_ends_is_exit_4_with_the_end_of_its_log(beside):
    ended = beside.call("0", STUB_DELAY_S="die")
    assert ended.returncode == 4 and "the server ended" in ended.stderr
    assert "no memory for the model\nof 12 GiB" in ended.stderr
    assert "share" not in ended.stdout  # the command was not run


def test_a_server_that_does_not_answer_in_time_is_exit_4_and_stopped(beside):
    ended = beside.call("0", STUB_DELAY_S="100", TEACHER_WAIT_S="1")
    assert ended.returncode == 4 and "did not answer within 1 s" in ended.stderr
    assert ended.stdout == "" and not beside.answers()
    assert_all_gone(beside.server()["processes"])


def test_a_port_at_which_somebody_else_listens_is_refused(beside):
    with socket.create_server(("127.0.0.1", beside.port)):
        ended = beside.call("0")
    assert ended.returncode == 2 and f"port {beside.port}" in ended.stderr
    assert not (beside.directory / "started").exists()


def test_sigterm_while_it_waits_stops_the_server(beside):
    process = beside.start("0", STUB_DELAY_S="100")
    wait_for(beside.directory / "started")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143 and "share" not in output
    assert_all_gone(beside.server()["processes"])
