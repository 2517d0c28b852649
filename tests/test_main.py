"""The command line, end to end, in processes of its own: exit codes and what a person reads.

All processes are started together, two at a time, by one fixture; each test looks at one of them.
What is refused after JAX was imported is the same code in each: two of these are always tried.
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

def get_config():
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


@dataclasses.dataclass(frozen=True)
class Case:
    """A run, and what is expected of it."""

    name: str
    arguments: tuple[str, ...] = ()
    extra: str = ""  # a statement of the config file
    code: int = 2
    told: tuple[str, ...] = ()  # all of it stands on stderr
    workdir: str = ""  # shared with another case; else the case's own


def data_case(name: str, *told: str) -> Case:
    return Case(name, (f"--config.data.train=FILES/{name}.jsonl",), told=told)


DATA_FILES = {
    "unparsable.jsonl": '{"prompt": "fine"}\n{"prompt": \n',
    "empty.jsonl": "\n",
    "no_turns.jsonl": '{"response": "b"}\n',
    "too_long.jsonl": json.dumps({"prompt": "x" * 100, "response": "b"}) + "\n",
}

CASES = [
    Case("flag_typo", ("--config.train.sede=1",), told=("train.sede", "config.train.seed")),
    Case("file_typo", extra="c.train.sede = 1", told=("file_typo.py, line 18", "'sede'", "'seed'")),
    Case("beta", ("--config.gkd.jsd_beta=2",), told=("gkd.jsd_beta", "[0, 1]")),
    Case("fraction", ("--config.gkd.on_policy_fraction=1.5",), told=("on_policy_fraction",)),
    Case("mode", ("--config=configs/gemma3.py:tny",), told=("gemma3.py:tny", "mode 'tny'")),
    Case("chunk_size", ("--config.gkd.chunk_size=0",), told=("gkd.chunk_size", "at least 1")),
    Case(
        "pattern",
        ("--config.context.target_content_pattern=(a",),
        told=("target_content_pattern = '(a'", "no regular expression"),
    ),
    Case("no_kernel", extra="c.student.lora.targets = ('r_proj',)", told=("r_proj", "q_proj")),
    Case("no_model", ("--config.student.model=/no/such",), told=("/no/such",)),
    Case("architecture", ("--config.student.model=FILES/mamba",), told=("mamba", "gemma3_text")),
    data_case("unparsable", "unparsable.jsonl: line 2, column 12"),
    data_case("empty", "empty.jsonl"),
    data_case("no_turns", "no_turns.jsonl:1", "prompt"),
    data_case("too_long", "too_long.jsonl:1", "data.max_length"),
    Case("no_system", ("--config.student.model=FILES/no_system",), told=("System role", "user")),
    Case(
        "no_targets",
        extra="c.context.target_roles = ('critic',)",
        told=("data.train", "'critic'", "assistant"),
    ),
    Case("equal_views", ("--config.context.student_retained_turns=1",), told=("loss would be",)),
    Case(
        "other_tokenizer",
        ("--config.teacher.backend=flax", "--config.teacher.model=FILES/other_tokenizer"),
        told=("FILES/other_tokenizer", "FILES/student", "tokenizer"),
    ),
    Case(
        "not_finite",
        ("--config.optim.learning_rate=1e30", "--config.optim.warmup_ratio=0"),
        code=3,
        told=("at step 1", "checkpoints"),
    ),
    Case("good", ("--config.log.progress_bar=False",), code=0, workdir="good"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
    """Models and data that the cases refer to as FILES/..."""
    directory = tmp_path_factory.mktemp("files")
    factories.model_dir(directory / "student")
    factories.model_dir(
        directory / "no_system", chat_template=factories.CHAT_TEMPLATE_WITHOUT_SYSTEM
    )
    factories.model_dir(directory / "other_tokenizer")
    tokenizer = directory / "other_tokenizer" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["vocab"]["Ä"] = content["model"]["vocab"].pop("A")
    tokenizer.write_text(json.dumps(content))
    (directory / "mamba").mkdir()
    (directory / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    for name, content in DATA_FILES.items():
        (directory / name).write_text(content)
    return directory


def start(case: Case, files: pathlib.Path) -> subprocess.CompletedProcess:
    config = files / f"{case.name}.py"
    config.write_text(CONFIG.format(student=str(files / "student"), extra=case.extra))
    arguments = [argument.replace("FILES", str(files)) for argument in case.arguments]
    workdir = files / "runs" / (case.workdir or case.name)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "gkdjax.main",
            f"--config={config}",
            f"--workdir={workdir}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": compiling.QUICK},
        timeout=600,
    )


RARE = ("no_kernel", "architecture", "empty", "no_turns", "too_long", "no_system", "no_targets")
RARE += ("equal_views", "other_tokenizer")
PARAMS = [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow(80)] * (case.name in RARE))
    for case in CASES
]


@pytest.fixture(scope="module")
def finished(files, request) -> dict[str, subprocess.CompletedProcess]:
    """Those that chosen tests look at."""
    slow = {bool(item.get_closest_marker("slow")) for item in request.session.items}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        cases = [case for case in CASES if (case.name in RARE) in slow]
        started = {case.name: pool.submit(start, case, files) for case in cases}
        return {name: future.result() for name, future in started.items()}


@pytest.mark.parametrize("case", PARAMS)
def test_exit_code_and_message(case, finished, files):
    process = finished[case.name]
    assert process.returncode == case.code, process.stderr
    for text in case.told:
        assert text.replace("FILES", str(files)) in process.stderr
    assert "Traceback" not in process.stderr
    if case.code:
        assert process.stderr.strip().splitlines()[-1].startswith("gkdjax: ")


def test_a_failed_run_keeps_its_last_good_checkpoint_and_its_metrics(finished, files):
    assert finished["not_finite"].returncode == 3
    workdir = files / "runs" / "not_finite"
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["1"]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0]
    assert not (workdir / "results.json").exists()


def test_a_finished_run_shows_its_table_and_another_config_is_refused(finished, files):
    assert finished["good"].returncode == 0
    said = finished["good"].stderr  # by this package, and not by the libraries under it
    assert "padded shapes" in said and "orbax" not in said
    page = files / "runs" / "good" / "report.html"
    whole = page.read_bytes()
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page.unlink()  # as after a kill right before it
    again = start(Case("good", ("--config.log.progress_bar=False",), workdir="good"), files)
    assert again.returncode == 0 and page.read_bytes() == whole
    first, _, table = finished["good"].stdout.partition("\n")
    assert "a response ends with <end_of_turn> (5)" in first
    assert again.stdout == table and re.search(r"^steps +3$", table, re.MULTILINE)
    arguments = ("--config.log.progress_bar=False", "--config.train.seed=7")
    other = start(Case("good", arguments, workdir="good"), files)
    assert other.returncode == 2
    assert "config.train.seed (now 7, was 0)" in other.stderr
