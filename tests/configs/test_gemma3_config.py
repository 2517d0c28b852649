"""configs/gemma3.py: the full mode is checked, the tiny one is run from end to end."""

import json
import os
import pathlib
import runpy
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import gkdjax
from gkdjax import config
from gkdjax.data.chat_template import load_chat
from gkdjax.data.examples import read_examples
from gkdjax.models.hf import load
from gkdjax.utils.files import read_lines

PATH = pathlib.Path(__file__).parents[2] / "configs/gemma3.py"
DATA = PATH.with_suffix("")
FILES = ("prompts", "anchor", "held_out")
V5E_CHIPS = 8


def get_config(mode: str):
    return runpy.run_path(str(PATH))["get_config"](mode)


def conversations(name: str) -> list[tuple]:
    return [row.turns for row in read_examples(str(DATA / f"{name}.jsonl"), name)]


def test_the_full_mode_parses_and_makes_no_model(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parsed = config.parse(get_config(""))
    assert list(tmp_path.iterdir()) == []
    assert (parsed.teacher.model, parsed.student.model) == (
        "google/gemma-3-1b-it",
        "google/gemma-3-270m-it",
    )
    for key, rows in config.rows_at_once(parsed).items():
        assert rows % V5E_CHIPS == 0, key
    (message,) = parsed.context.prefix_messages
    assert message["role"] == "system" and "Check:" in message["content"]


def test_an_unknown_mode_is_told_which_there_are():
    with pytest.raises(ValueError, match=r"mode 'tny'.*gemma3\.py:tiny"):
        get_config("tny")


def test_no_question_stands_in_two_files_or_twice():
    questions = {name: [turns[-1].content for turns in conversations(name)] for name in FILES}
    assert {name: len(asked) for name, asked in questions.items()} == {
        "prompts": 200,
        "anchor": 64,
        "held_out": 32,
    }
    words = ["".join(q.lower().split()) for asked in questions.values() for q in asked]
    assert len(set(words)) == len(words)


def test_half_of_the_anchor_obeys_other_system_messages():
    roles = [turns[0].role for turns in conversations("anchor")]
    assert roles.count("system") == 32
    baked = json.loads((DATA / "prefix.json").read_text())[0]["content"]
    assert baked not in {turns[0].content for turns in conversations("anchor")}


def test_the_tiny_mode_is_ready_before_jax_is_loaded(tmp_path):
    """`gkdjax.main` counts the devices out after it has read the config."""
    code = f"import runpy, sys; runpy.run_path({str(PATH)!r})['get_config']('tiny')"
    check = "; assert 'jax' not in sys.modules, 'jax is loaded'"
    environment = os.environ | {"PYTHONPATH": str(PATH.parents[1])}
    subprocess.run([sys.executable, "-c", code + check], check=True, cwd=tmp_path, env=environment)
    made = sorted(path.name for path in (tmp_path / "runs/tiny_models").iterdir())
    assert made == ["student-262144", "teacher-262144"]


@pytest.mark.usefixtures("optimised")
def test_the_tiny_mode_runs_from_end_to_end(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    c = get_config("tiny")
    c.gkd.on_policy_warmup_steps = 0  # one divergence, one compilation less
    c.gkd.on_policy_fraction = 0.6  # of the three steps: the second, with seed 0
    c.train.steps = 3
    c.eval.retention, c.eval.other_prefix = {}, ()  # nor what test_examples.py measures
    c.log.tensorboard = c.log.progress_bar = False
    workdir = pathlib.Path("runs/gemma3-tiny")
    results = gkdjax.run(c, workdir)

    assert json.loads((workdir / "results.json").read_text()) == results
    assert results["exports"] == ["merged/", "adapter/"]
    assert len(results["samples"]["student"]) == 3
    steps = read_lines(workdir / "metrics.jsonl")
    assert [s["on_policy_rows"] for s in steps] == [0, 8, 0]
    assert steps[2]["loss"] < steps[0]["loss"]  # on the same eight rows
    assert steps[0]["anchor_loss"] < 1e-6 < steps[1]["anchor_loss"]

    decoder, params = load.load_pretrained(str(workdir / "merged"))
    assert decoder.spec.vocab_size == 262_144 and params["embedding"].dtype == jnp.bfloat16
    _, base = load.load_pretrained(c.student.model)
    layers = params["layers"]
    moved = [name for name in layers if not np.array_equal(layers[name], base["layers"][name])]
    assert moved == [name for name in layers if name.endswith("_proj")]
    chat = load_chat(str(workdir / "merged"))
    for written in (workdir / "trajectories_train.jsonl").read_text().splitlines():
        assert max(json.loads(written)["ids"]) < len(chat.tokenizer)
