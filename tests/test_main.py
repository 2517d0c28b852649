"""The command line, end to end, in processes of its own: exit codes and what a person reads.

All processes are started together, two at a time, by one fixture; each test looks at one of them.
Other refusals of a run, in this process: tests/train/test_refusals.py.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import compiling
import factories
import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """\
from gkdjax import config

def get_config(mode=''):
    c = config.default()
    c.student.model = {student!r}
    c.context.prefix_messages = [{{"role": "system", "content": "be brief"}}]
    c.data.train = [{{"prompt": "a", "response": "b"}}, {{"prompt": "c", "response": "d"}}]
    c.data.max_length = 64
    c.data.bucket_lengths = (64,)
    c.student.lora.rank = 2
    c.train.batch_size = 2
    c.train.epochs = None
    c.train.steps = 3
    c.eval.max_new_tokens = 4
    c.eval.batch_size = 4
    c.rollout.max_new_tokens = 4
    c.checkpoint.every_steps = 1
    {extra}
    return c
"""
DATA_FILES = {
    "unparsable.jsonl": '{"prompt": "fine"}\n{"prompt": \n',
    "no_turns.jsonl": '{"response": "b"}\n',
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A run, and what is expected of it."""

    arguments: str
    messages: tuple[str, ...] = ()  # all of them stand on stderr
    extra: str = ""  # a statement of the config file
    mode: str = ""  # the argument of get_config
    code: int = 2


QUIET = "--config.log.progress_bar=False"
CASES = {
    "flag_typo": Case("--config.train.sede=1", ("train.sede", "config.train.seed")),
    "file_typo": Case("", ("file_typo.py, line 18", "'sede'", "'seed'"), extra="c.train.sede = 1"),
    "value": Case("--config.gkd.jsd_beta=2", ("gkd.jsd_beta", "[0, 1]")),
    "mode": Case(f"--config={ROOT}/configs/gemma3.py:tny", ("gemma3.py:tny", "mode 'tny'")),
    "no_model": Case("--config.student.model=/no/such", ("/no/such",)),
    "unparsable": Case(
        "--config.data.train=FILES/unparsable.jsonl", ("unparsable.jsonl: line 2, column 12",)
    ),
    "no_turns": Case("--config.data.train=FILES/no_turns.jsonl", ("no_turns.jsonl:1", "prompt")),
    "not_finite": Case(
        "--config.gkd.temperature=1e-36",  # the square of a gradient is infinite
        ("3 steps in a row, up to step 2", "--config.optim.learning_rate"),
        code=3,
    ),
    "good": Case(QUIET, code=0, mode=":any"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
    """Models and data that the cases refer to as FILES/..."""
    directory = tmp_path_factory.mktemp("files")
    factories.model_dir(directory / "student")
    for name, content in DATA_FILES.items():
        (directory / name).write_text(content)
    return directory


def start(
    files: pathlib.Path, name: str, arguments: str | None = None
) -> subprocess.CompletedProcess:
    case, config = CASES[name], files / f"{name}.py"
    config.write_text(CONFIG.format(student=str(files / "student"), extra=case.extra))
    command = [sys.executable, "-m", "gkdjax.main", f"--config={config}{case.mode}"]
    arguments = (case.arguments if arguments is None else arguments).replace("FILES", str(files))
    return subprocess.run(
        [*command, *arguments.split()],
        capture_output=True,
        text=True,
        cwd=files,  # the run lives in runs/NAME or runs/NAME-MODE there
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": compiling.QUICK},
        timeout=600,
    )


@pytest.fixture(scope="module")
def finished(files) -> dict[str, subprocess.CompletedProcess]:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        started = {name: pool.submit(start, files, name) for name in CASES}
        return {name: future.result() for name, future in started.items()}


@pytest.mark.parametrize("name", CASES)
def test_exit_code_and_message(finished, name):
    process, case = finished[name], CASES[name]
    assert process.returncode == case.code, process.stderr
    assert all(message in process.stderr for message in case.messages)
    assert "Traceback" not in process.stderr
    if case.code:
        assert process.stderr.strip().splitlines()[-1].startswith("gkdjax: ")


def test_a_failed_run_leaves_nothing_that_looks_finished(finished, files):
    workdir = files / "runs" / "not_finite"
    lines = (workdir / "bad_steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert not (workdir / "results.json").exists() and not (workdir / "merged").exists()


def test_a_finished_run_shows_its_table_and_another_config_is_refused(finished, files):
    good = finished["good"]
    # What is logged is this package's, and not that of the libraries under it.
    assert "padded shapes" in good.stderr and "orbax" not in good.stderr
    page = files / "runs" / "good-any" / "report.html"
    whole = page.read_bytes()
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page.unlink()  # as after a kill right before it
    again = start(files, "good")
    assert again.returncode == 0 and page.read_bytes() == whole
    first, _, table = good.stdout.partition("\n")
    assert "a response ends with <end_of_turn> (5)" in first
    assert again.stdout == table and re.search(r"^steps +3$", table, re.MULTILINE)
    other = start(files, "good", f"{QUIET} --config.train.seed=7")
    assert other.returncode == 2
    assert "config.train.seed (now 7, was 0)" in other.stderr


_PRINTING = """
from absl import logging
from gkdjax.config import cli
from gkdjax.utils.errors import TrainingFailure

def main(parsed, workdir):
    print("x" * 10**5)
    logging.warning("y" * 10**5)
    raise TrainingFailure("the end")

cli.run(main)
"""


@pytest.mark.parametrize("full", [("stdout",), ("stdout", "stderr")])
def test_a_full_disk_below_what_is_printed_ends_nothing(full):
    command = [sys.executable, "-c", _PRINTING, f"--config={ROOT}/configs/quickstart.py"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with open("/dev/full", "w") as lost:
        streams |= dict.fromkeys(full, lost)
        process = subprocess.run(command, **streams, text=True, cwd=ROOT, timeout=600)
    assert process.returncode == 3
    if "stderr" not in full:
        assert "stdout is lost: No space left on device\n" in process.stderr
        assert process.stderr.endswith("gkdjax: the end\n") and "Trace" not in process.stderr
