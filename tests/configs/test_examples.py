"""Every example: its data fit together, and its tiny mode is run from end to end."""

import json
import math
import pathlib
import re
import runpy

import jax.numpy as jnp
import numpy as np
import pytest

import gkdjax
from gkdjax import config
from gkdjax.data import load
from gkdjax.data.answer_matching import is_right
from gkdjax.data.chat_template import load_chat
from gkdjax.data.examples import read_examples
from gkdjax.models.hf.load import load_pretrained
from gkdjax.utils.files import read_lines

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
EXAMPLES = (
    *("basic", "multi_turn_prefix", "per_row_personas", "pattern_targets", "sft_dataset"),
    *("continual_memory", "corpus_knowledge"),
)
WITH_DATA = (*EXAMPLES, "gemma3")
HUB = re.compile(r"[\w-]+/[\w-]+:\w+(\[:\d+\])?")  # a dataset; the tests have no network
# A tiny run has to reduce its measure to this share of its start. Measured: 0.15 to 0.38.
MEASURES = dict.fromkeys(EXAMPLES, "teacher_text/forward_kl")
MEASURES |= {"pattern_targets": "validation/loss"}
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
    """The files that a full mode names, and those of its folder."""
    named = map(pathlib.Path, strings(get_config(name).to_dict()))
    found = {path for path in named if path.suffix in (".jsonl", ".json", ".txt")}
    return sorted(found | {*(CONFIGS / name).iterdir()})


def conversation(row: dict) -> str:
    """All messages to the assistant in a row, in lower-case letters and digits."""
    messages = [m["content"] for m in row["messages"]] if "messages" in row else [row["prompt"]]
    return re.sub(r"\W", "", " ".join(messages).lower())


@pytest.mark.parametrize("name", EXAMPLES)
def test_all_of_the_data_is_read_and_fits_together(name):
    c = get_config(name)
    parsed = config.parse(c)
    assert parsed.student.model.startswith("Qwen/Qwen3-")
    assert parsed.anchor.data is not None  # without one the rest of the student is lost
    assert parsed.eval.every_steps is not None
    files = data_files(name)
    assert len(files) >= 3 and all(path.is_file() for path in files)
    if name == "sft_dataset":
        assert HUB.fullmatch(c.data.train) and HUB.fullmatch(c.data.validation)
        c.data.train, c.data.validation = str(CONFIGS / name / "sample.jsonl"), 0.25
    examples = load.load_examples(config.parse(c))
    assert len(examples.train) >= 18 and examples.anchors and examples.prompts
    assert all(row.prefix for row in examples.prompts)  # there is something to be baked


@pytest.mark.parametrize("name", WITH_DATA)
def test_no_row_stands_in_two_files_or_twice(name):
    found: dict[str, str] = {}
    for path in data_files(name):
        if path.suffix != ".jsonl" or path.name == "documents.jsonl":
            continue
        for number, row in enumerate(read_lines(path), start=1):
            said = conversation(row)
            assert said not in found, f"{path.name}:{number} is {found[said]}"
            found[said] = f"{path.name}:{number}"


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("*/*.jsonl")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_every_data_file_is_read_by_one_of_the_configs(path):
    users = [name for name in WITH_DATA if path in data_files(name)]
    assert users, "nobody reads it"
    # The tiny models' tokenizer knows nothing else; of Gemma's rows they read the first ones.
    assert users == ["gemma3"] or path.read_text().isascii()
    if path.name != "documents.jsonl":
        rows = read_lines(path)
        match = "keywords" if "answer" in rows[0] else None
        assert len(read_examples(str(path), "a file", match=match)) == len(rows)


@pytest.mark.parametrize(
    ("file", "match", "question", "right", "wrong"),
    [
        (
            "general/facts",
            "keywords",
            "What is the chemical symbol of gold?",
            "It is Au.",
            ["Because it shines."],
        ),
        (
            "corpus_knowledge/questions",
            "keywords",
            "How many pipes does the Tide Organ have?",
            "Forty-six pipes.",
            ["It has 146 pipes."],
        ),
        (
            "multi_turn_prefix/questions",
            "regex",
            "Somebody has to measure the kitchen.",
            "- | measure the kitchen | -",
            ["Sure: - | measure the kitchen | -"],
        ),
        (
            "pattern_targets/questions",
            "regex",
            "A carton holds 18 cans. How many cans are in 6 cartons?",
            "18 times 6 is 108.\nAnswer: 108",
            ["18 times 6 is 108.", "Answer: 1080"],
        ),
    ],
)
def test_right_answers_are_told_from_wrong_ones(file, match, question, right, wrong):
    rows = read_examples(str(CONFIGS / f"{file}.jsonl"), "a file", match=match)
    (expected,) = [row.expected for row in rows if row.turns[-1].content == question]
    assert is_right(right, expected) and not any(is_right(text, expected) for text in wrong)


def test_worked_problems_have_a_line_that_the_pattern_matches_and_bakerys_does_not():
    pattern = get_config("pattern_targets").context.target_content_pattern
    for row in read_lines(CONFIGS / "pattern_targets/worked.jsonl"):
        (line,) = re.findall(pattern, row["response"])
        assert line == row["response"].splitlines()[-1] != "Answer: "
        assert re.search("^Answer:", row["response"]) is None


def test_each_persona_is_called_by_its_name():
    """Else the student could not tell which is meant, and would learn their average."""
    for file in ("rows", "questions"):
        for row in read_lines(CONFIGS / f"per_row_personas/{file}.jsonl"):
            said = row["messages"][-1]["content"]
            names = [n for n in ("Captain Brine", "Doctor Quill", "Tilly") if n in said]
            prefix = row.get("prefix_messages")
            assert [f"You are {n}," in prefix[0]["content"] for n in names] == [True] * bool(prefix)


def test_a_question_about_a_chat_is_answered_where_only_the_teacher_reads():
    """In its beginning, so recovery is defined."""
    c = config.parse(get_config("continual_memory"))
    for row in load.load_examples(c).questions:
        told, read = row.prefix[:-2], (*row.prefix[-2:], *row.turns)
        assert is_right(told[0].content, row.expected), row.name
        assert not is_right(" ".join(m.content for m in read), row.expected), row.name


def test_half_of_gemma3s_anchor_obeys_other_system_messages():
    counts = {"prompts": 200, "anchor": 64, "held_out": 32}
    rows = {name: read_examples(str(CONFIGS / f"gemma3/{name}.jsonl"), name) for name in counts}
    assert {name: len(found) for name, found in rows.items()} == counts
    systems = [row.turns[0] for row in rows["anchor"] if row.turns[0].role == "system"]
    baked = json.loads((CONFIGS / "gemma3/prefix.json").read_text())[0]["content"]
    assert len(systems) == 32 and baked not in {turn.content for turn in systems}


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory, optimised) -> pathlib.Path:
    """The working directory of all of them: they share their model."""
    return tmp_path_factory.mktemp("tiny")


def run_tiny(c, name: str) -> tuple[dict, pathlib.Path]:
    c.log.tensorboard = c.log.progress_bar = False
    workdir = pathlib.Path("runs") / name
    results = gkdjax.run(c, workdir)
    assert json.loads((workdir / "results.json").read_text()) == results
    return results, workdir


SLOW = pytest.mark.slow(60, apart=True)


@SLOW
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_tiny_mode_runs_and_bakes(name, tiny_runs, monkeypatch):
    monkeypatch.chdir(tiny_runs)
    results, workdir = run_tiny(get_config(name, "tiny"), name)
    before, after = (results["held_out"][when][MEASURES[name]] for when in ("before", "after"))
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
    written = read_lines(workdir / "trajectories_train.jsonl")
    if name == "basic":  # half-baked states are kept
        kept = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}
        assert kept >= {line["step"] for line in read_lines(workdir / "eval.jsonl")} - {0}
        assert results["exports"] == ["merged/", "adapter/"]
    if name in ("multi_turn_prefix", "corpus_knowledge"):  # on-policy in the second half
        rows = [line["on_policy_rows"] for line in steps]
        assert not any(rows[: len(rows) // 2]) and any(rows[len(rows) // 2 :])
    if name == "per_row_personas":
        prefixes = [json.dumps(row["prefix_messages"]) for row in written if row["prefix_messages"]]
        assert len(prefixes) == len({*prefixes}) == 4
    if name == "sft_dataset":
        assert written == []
        counts = [results["rows"][stream]["rows"] for stream in ("train", "validation")]
        assert counts == [18, 6]


@SLOW
def test_the_tiny_mode_of_gemma3_runs_from_end_to_end(tiny_runs, monkeypatch):
    monkeypatch.chdir(tiny_runs)
    c = get_config("gemma3", "tiny")
    c.gkd.on_policy_warmup_steps = 0  # one divergence, one compilation less
    c.gkd.on_policy_fraction = 0.6  # of the three steps: the second, with seed 0
    c.train.steps = 3
    c.eval.retention, c.eval.other_prefix = {}, ()  # measured by the other examples
    results, workdir = run_tiny(c, "gemma3-tiny")
    assert results["exports"] == ["merged/", "adapter/"]
    assert len(results["samples"]["student"]) == 3
    steps = read_lines(workdir / "metrics.jsonl")
    assert [s["on_policy_rows"] for s in steps] == [0, 8, 0]
    assert steps[2]["loss"] < steps[0]["loss"]  # on the same eight rows
    assert steps[0]["anchor_loss"] < 1e-6 < steps[1]["anchor_loss"]

    decoder, params = load_pretrained(workdir / "merged")
    assert decoder.spec.vocab_size == 262_144 and params["embedding"].dtype == jnp.bfloat16
    _, base = load_pretrained(c.student.model)
    layers = params["layers"]
    moved = [name for name in layers if not np.array_equal(layers[name], base["layers"][name])]
    assert moved == [name for name in layers if name.endswith("_proj")]
    known = len(load_chat(str(workdir / "merged")).tokenizer)
    for row in read_lines(workdir / "trajectories_train.jsonl"):
        assert max(row["ids"]) < known
