"""launch/teacher_vllm.sh with a stand-in for vLLM: a run beside its teacher, in processes."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
from launch.together import LAUNCH, call, executable, free_port, started, wait_for

STUB = pathlib.Path(__file__).with_name("stub_vllm.py")
TRAINER = 'echo "share $XLA_PYTHON_CLIENT_MEM_FRACTION"; exit "$0"'


class Beside:
    """The script, its server and the files that they leave in a directory."""

    def __init__(self, directory: pathlib.Path):
        self.directory, self.port = directory, free_port()
        text = f'#!/bin/sh\nexec {sys.executable} {STUB} "$@"\n'
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "STUB_DIR": str(directory),
            "VLLM_PYTHON": str(executable(directory / "vllm_python", text)),
            "TEACHER_LOG": str(directory / "log"),
        }

    def command(self, ends: str | list[str], *arguments: str) -> list:
        """`ends` is the code of a command that does little, or another command."""
        command = ["bash", "-c", TRAINER, ends] if isinstance(ends, str) else ends
        script = [LAUNCH / "teacher_vllm.sh", "model", "teacher", str(self.port)]
        return [*script, *arguments, "--", *command]

    def start(self, ends: str | list[str], **more: str):
        return started(self.command(ends), self._environment | more)

    def call(
        self, ends: str | list[str], *arguments: str, **more: str
    ) -> subprocess.CompletedProcess:
        return call(self.command(ends, *arguments), self._environment | more)

    def answers(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def server(self) -> dict:
        return json.loads((self.directory / "started").read_text())

    def key(self, mode: int, text: str = "s3cret\n") -> dict[str, str]:
        file = self.directory / "key"
        file.write_text(text)
        file.chmod(mode)
        return {"TEACHER_KEY_FILE": str(file), "TEACHER_KEY_ENV": "TEACHER_KEY"}


@pytest.fixture
def beside(tmp_path):
    ours = Beside(tmp_path)
    yield ours
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # only after a failure
        os.killpg(ours.server()["processes"][0], signal.SIGKILL)


def is_gone(process: int) -> bool:
    """An orphan that nobody has asked about yet is gone, too."""
    try:
        stat = pathlib.Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def test_the_command_runs_beside_a_server_that_answers(beside):
    health = f"urllib.request.urlopen('http://127.0.0.1:{beside.port}/health').status"
    run = f"import os, sys, urllib.request; print({health}, os.environ['TEACHER_KEY'],"
    run += " os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'], 'VLLM_API_KEY' in os.environ)"
    ended = beside.call(
        [sys.executable, "-c", run + "; sys.exit(7)"],
        *("--max-model-len", "512"),
        **beside.key(0o600),
        STUB_DELAY_S="1",
    )
    assert ended.returncode == 7, ended.stderr
    assert ended.stdout == "200 s3cret 0.4 False\n"
    text = " ".join(beside.server()["arguments"])
    assert text.startswith("-m vllm.entrypoints.openai.api_server ")
    assert beside.server()["key"] == "s3cret" and "s3cret" not in text
    assert text.endswith("--max-model-len 512 --gpu-memory-utilization 0.45")
    assert "--host 127.0.0.1" in text and "--max-logprobs 64" in text
    assert not beside.answers()


@pytest.mark.parametrize(
    ("arguments", "more", "share", "gpus", "last"),
    [
        ([], {}, "0.4", None, ["--gpu-memory-utilization", "0.45"]),
        (
            ["--gpu-memory-utilization", "0.6"],
            {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".3"},
            *(".3", None, ["--gpu-memory-utilization", "0.6"]),
        ),
        (["--x", "1"], {"TEACHER_GPUS": "1"}, "", "1", ["--x", "1"]),  # GPUs of its own
    ],
)
def test_memory_is_shared_unless_the_user_divides_it(beside, arguments, more, share, gpus, last):
    ended = beside.call("0", *arguments, **more)
    found = beside.server()
    assert found["arguments"][-2:] == last and found["gpus"] == gpus
    assert ("0.45" in found["arguments"]) == (last[-1] == "0.45")
    assert f"share {share}\n" in ended.stdout


def test_the_command_is_asked_to_stop_and_the_server_goes_after_it(beside):
    health, begun = f"127.0.0.1:{beside.port}/health", beside.directory / "begun"
    run = f"trap 'curl -s {health} && echo still there; exit 75' TERM; touch {begun};"
    with beside.start(["bash", "-c", run + " while true; do sleep 0.05; done"]) as process:
        wait_for(begun.exists)
        process.send_signal(signal.SIGTERM)
        shown, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and shown == "still there\n"
    assert not beside.answers()


def test_keys_that_cannot_be_used_are_refused(beside):
    for mode in (0o644, 0o640, 0o604, 0o620):
        ended = beside.call("0", **beside.key(mode))
        assert ended.returncode == 2 and f"chmod 600 {beside.directory}/key" in ended.stderr
    for more, named in (
        ({"TEACHER_KEY_FILE": "/no/such", "TEACHER_KEY_ENV": "A"}, "is no file"),
        ({"TEACHER_KEY_FILE": "key"}, "set TEACHER_KEY_ENV"),
        (beside.key(0o600, "\n"), "is empty"),
    ):
        ended = beside.call("0", **more)
        assert ended.returncode == 2 and named in ended.stderr
    assert not (beside.directory / "started").exists()


def test_a_server_that_ends_is_exit_4_with_the_end_of_its_log(beside):
    ended = beside.call("0", STUB_DELAY_S="die")
    assert ended.returncode == 4 and "the server ended" in ended.stderr
    assert "no memory for the model\nof 12 GiB" in ended.stderr
    assert "share" not in ended.stdout  # the command was not run


def test_a_server_that_does_not_answer_in_time_is_exit_4_and_stopped(beside):
    ended = beside.call("0", STUB_DELAY_S="100", TEACHER_WAIT_S="1")
    assert ended.returncode == 4 and "did not answer within 1 s" in ended.stderr
    assert ended.stdout == "" and not beside.answers()
    wait_for(lambda: all(map(is_gone, beside.server()["processes"])))


def test_a_port_at_which_another_program_listens_is_refused(beside):
    with socket.create_server(("127.0.0.1", beside.port)):
        ended = beside.call("0")
    assert ended.returncode == 2 and f"port {beside.port}" in ended.stderr
    assert not (beside.directory / "started").exists()


def test_sigterm_while_it_waits_stops_the_server(beside):
    with beside.start("0", STUB_DELAY_S="100") as process:
        wait_for((beside.directory / "started").exists)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        wait_for(lambda: all(map(is_gone, beside.server()["processes"])))
    assert process.returncode == 143 and "share" not in output
