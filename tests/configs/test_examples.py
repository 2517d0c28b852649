"""Every example: its full mode is checked, its tiny mode is run from end to end."""

import json
import math
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

import gkdjax
from gkdjax import config
from gkdjax.data import load
from gkdjax.data.answer_matching import is_right
from gkdjax.data.examples import read_examples
from gkdjax.utils.files import read_lines

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
EXAMPLES = (
    "basic",
    "multi_turn_prefix",
    "per_row_personas",
    "pattern_targets",
    "sft_dataset",
    "continual_memory",
    "corpus_knowledge",
)
WITH_MODES = (*EXAMPLES, "gemma3")
HUB = re.compile(r"[\w-]+/[\w-]+:\w+(\[:\d+\])?")  # a dataset; the tests have no network
SHIFT = "teacher_text/forward_kl"
# What a tiny run has to reduce, and to which share at most of what it was. Measured: 0.15 to 0.38.
MEASURES = dict.fromkeys(EXAMPLES, SHIFT) | {"pattern_targets": "validation/loss"}
MOST_LEFT = 0.6


def get_config(name: str, mode: str = ""):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](mode)


def strings(value) -> list[str]:
    """Every string in a config, as to_dict has it."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def data_files(name: str) -> list[pathlib.Path]:
    """Those that a full mode names and those of its folder."""
    named = strings(get_config(name).to_dict())
    found = {
        pathlib.Path(text) for text in named if pathlib.Path(text).suffix in (".jsonl", ".txt")
    }
    return sorted(found | {*(CONFIGS / name).iterdir()})


def conversation(row: dict) -> str:
    """All that is said to the assistant in a row, in lower-case letters and digits."""
    said = [m["content"] for m in row["messages"]] if "messages" in row else [row["prompt"]]
    return re.sub(r"\W", "", " ".join(said).lower())


def rows_of(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_full_mode_parses_makes_no_model_and_names_files_that_are_there(
    name, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    c = get_config(name)
    parsed = config.parse(c)
    assert list(tmp_path.iterdir()) == []
    assert parsed.student.model.startswith("Qwen/Qwen3-")
    assert parsed.anchor.data is not None  # without one the rest of the student is lost
    assert parsed.eval.every_steps is not None
    paths = [text for text in strings(c.to_dict()) if text.endswith((".jsonl", ".json", ".txt"))]
    assert len(paths) >= 3 and all(pathlib.Path(path).is_file() for path in paths)


@pytest.mark.parametrize("name", EXAMPLES)
def test_all_of_the_data_is_read_and_fits_together(name):
    c = get_config(name)
    if name == "sft_dataset":
        assert HUB.fullmatch(c.data.train) and HUB.fullmatch(c.data.validation)
        c.data.train, c.data.validation = str(CONFIGS / name / "sample.jsonl"), 0.25
    examples = load.load_examples(config.parse(c))
    assert len(examples.train) >= 18 and examples.anchors and examples.prompts
    assert all(row.prefix for row in examples.prompts)  # there is something to be baked


@pytest.mark.parametrize("name", WITH_MODES)
def test_no_row_stands_in_two_files_or_twice(name):
    found: dict[str, str] = {}
    for path in data_files(name):
        if path.suffix != ".jsonl" or path.name == "documents.jsonl":
            continue
        for number, row in enumerate(rows_of(path), start=1):
            said = conversation(row)
            assert said not in found, f"{path.name}:{number} is {found[said]}"
            found[said] = f"{path.name}:{number}"


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("*/*.jsonl")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_every_data_file_is_read_by_one_of_the_configs(path):
    users = [name for name in WITH_MODES if path in data_files(name)]
    assert users, "nobody reads it"
    # The tiny models' tokenizer knows nothing else; of Gemma's rows they read the first ones.
    assert users == ["gemma3"] or path.read_text().isascii()
    if path.name != "documents.jsonl":
        rows = rows_of(path)
        match = "keywords" if "answer" in rows[0] else None
        assert len(read_examples(str(path), "a file", match=match)) == len(rows)


def test_the_answers_are_told_from_others():
    """A sample of what models write, right and wrong, for each kind of question."""
    facts = asked("general/facts.jsonl")
    gold = facts["What is the chemical symbol of gold?"]
    assert is_right("It is Au.", gold) and not is_right("Because it shines.", gold)
    pipes = asked("corpus_knowledge/questions.jsonl")["How many pipes does the Tide Organ have?"]
    assert is_right("Forty-six pipes.", pipes) and not is_right("It has 146 pipes.", pipes)
    notes = asked("multi_turn_prefix/questions.jsonl", "regex")
    line = notes["Somebody has to measure the kitchen."]
    assert is_right("- | measure the kitchen | -", line)
    assert not is_right("Sure: - | measure the kitchen | -", line)
    cans = asked("pattern_targets/questions.jsonl", "regex")
    cans = cans["A carton holds 18 cans. How many cans are in 6 cartons?"]
    assert is_right("18 times 6 is 108.\nAnswer: 108", cans)
    assert not is_right("18 times 6 is 108.", cans) and not is_right("Answer: 1080", cans)


def asked(file: str, match: str = "keywords") -> dict:
    rows = read_examples(str(CONFIGS / file), "a file", match=match)
    return {row.turns[-1].content: row.expected for row in rows}


def test_worked_problems_have_a_line_that_the_pattern_matches_and_bakerys_does_not():
    pattern = get_config("pattern_targets").context.target_content_pattern
    for row in rows_of(CONFIGS / "pattern_targets/worked.jsonl"):
        (line,) = re.findall(pattern, row["response"])
        assert line == row["response"].splitlines()[-1] != "Answer: "
        assert re.search("^Answer:", row["response"]) is None


def test_each_persona_is_called_by_its_name():
    """Else the student could not tell which is meant, and would learn their average."""
    for file in ("rows", "questions"):
        for row in rows_of(CONFIGS / f"per_row_personas/{file}.jsonl"):
            said = row["messages"][-1]["content"]
            names = [n for n in ("Captain Brine", "Doctor Quill", "Tilly") if n in said]
            prefix = row.get("prefix_messages")
            assert [f"You are {n}," in prefix[0]["content"] for n in names] == [True] * bool(prefix)


def test_what_is_asked_of_a_chat_was_told_where_the_student_does_not_read():
    """But in its beginning: the teacher reads it there, so recovery is defined."""
    c = config.parse(get_config("continual_memory"))
    for row in load.load_examples(c).questions:
        told, read = row.prefix[:-2], (*row.prefix[-2:], *row.turns)
        assert is_right(told[0].content, row.expected), row.name
        assert not is_right(" ".join(m.content for m in read), row.expected), row.name


@pytest.mark.parametrize("name", WITH_MODES)
def test_an_unknown_mode_is_told_which_there_are(name):
    with pytest.raises(ValueError, match=rf"mode 'tny'.*configs/{name}\.py:tiny"):
        get_config(name, "tny")


@pytest.mark.parametrize("name", WITH_MODES)
def test_both_commands_stand_in_the_docstring(name):
    told = runpy.run_path(str(CONFIGS / f"{name}.py"))["__doc__"]
    command = f"    python -m gkdjax.main --config=configs/{name}.py"
    assert f"{command}\n" in told and f"{command}:tiny\n" in told
    told = " ".join(told.split())
    assert "this mode has not been run yet" in told and "on 2 CPU cores" in told


def test_tiny_modes_are_ready_before_jax_is_loaded(tmp_path):
    """`gkdjax.main` counts the devices out after it has read the config."""
    code = "import runpy, sys\nfor path in sys.argv[1:]:\n"
    code += "    runpy.run_path(path)['get_config']('tiny')\n"
    code += "    assert 'jax' not in sys.modules, path"
    paths = [str(CONFIGS / f"{name}.py") for name in EXAMPLES]
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
    command = [sys.executable, "-c", code, *paths]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    made = sorted(path.name for path in (tmp_path / "runs/tiny_models").iterdir())
    assert made == ["corpus_knowledge-documents.jsonl", "student-512"]


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory, optimised) -> pathlib.Path:
    """Where all of them run: they share their model."""
    return tmp_path_factory.mktemp("tiny")


def run_tiny(name: str, tiny_runs: pathlib.Path, monkeypatch) -> tuple[dict, pathlib.Path]:
    monkeypatch.chdir(tiny_runs)
    c = get_config(name, "tiny")
    c.log.tensorboard = c.log.progress_bar = False
    workdir = pathlib.Path("runs") / name
    results = gkdjax.run(c, workdir)
    assert json.loads((workdir / "results.json").read_text()) == results
    return results, tiny_runs / workdir


SLOW = pytest.mark.slow(60, apart=True)


@pytest.mark.parametrize(
    "name", [EXAMPLES[0], *(pytest.param(name, marks=SLOW) for name in EXAMPLES[1:])]
)
def test_the_tiny_mode_runs_and_bakes(name, tiny_runs, monkeypatch):
    results, workdir = run_tiny(name, tiny_runs, monkeypatch)
    measure = MEASURES[name]
    before, after = (results["held_out"][when][measure] for when in ("before", "after"))
    assert 0 < after < MOST_LEFT * before
    assert results["side_effects"]["forward_kl"] > 0
    steps = read_lines(workdir / "metrics.jsonl")
    assert all(math.isfinite(line["loss"]) for line in steps)
    # Nothing that the full mode measures is lost on the way to the tiny one.
    full = config.parse(get_config(name)).eval
    assert ("student_other_prefix" in results) == bool(full.other_prefix)
    assert ("accuracy" in results["student"]) == (full.questions is not None)
    assert ("heldout_accuracy" in results["student"]) == (full.heldout is not None)
    assert list(results["retention"]) == list(full.retention)
    CHECKS.get(name, lambda *_: None)(results, workdir, steps)


def half_baked_states_are_kept(results, workdir, steps):
    kept = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert set(kept) >= {line["step"] for line in read_lines(workdir / "eval.jsonl")} - {0}
    assert results["exports"] == ["merged/", "adapter/"]


def the_student_writes_in_the_second_half(results, workdir, steps):
    written = [line["on_policy_rows"] for line in steps]
    assert not any(written[: len(written) // 2]) and any(written[len(written) // 2 :])


def there_is_a_prefix_a_persona(results, workdir, steps):
    lines = read_lines(workdir / "trajectories_train.jsonl")
    told = [json.dumps(line["prefix_messages"]) for line in lines if line["prefix_messages"]]
    assert len(told) == len({*told}) == 4


def nobody_writes(results, workdir, steps):
    assert read_lines(workdir / "trajectories_train.jsonl") == []
    assert [results["rows"][stream]["rows"] for stream in ("train", "validation")] == [18, 6]


CHECKS = {
    "basic": half_baked_states_are_kept,
    "multi_turn_prefix": the_student_writes_in_the_second_half,
    "corpus_knowledge": the_student_writes_in_the_second_half,
    "per_row_personas": there_is_a_prefix_a_persona,
    "sft_dataset": nobody_writes,
}
