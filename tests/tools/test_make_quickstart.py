"""The tool that makes the embedded quickstart, in its tiny mode; and what is shipped."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import gkdjax
from gkdjax.models.hf import load
from gkdjax.tools.make_quickstart import build, pretrain, report, task, tokenizer
from gkdjax.utils.errors import UserError

ASSETS = pathlib.Path(gkdjax.__file__).parent / "config" / "assets" / "quickstart"
ROW_FILES = (
    "train.jsonl",
    "anchor.jsonl",
    "questions.jsonl",
    "retention/reverse.jsonl",
    "retention/sort.jsonl",
    "retention/other_keys.jsonl",
)
CONVERSATION = [
    {"role": "system", "content": "ad ba"},
    {"role": "user", "content": "map: ab"},
    {"role": "assistant", "content": "da"},
]


SLOW = pytest.mark.slow(60)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> pathlib.Path:
    """What the tool makes in its tiny mode."""
    out = tmp_path_factory.mktemp("quickstart") / "made"
    build.make(str(out), 0, build.TINY)
    return out


@pytest.fixture(scope="module", params=[pytest.param("tiny", marks=SLOW), "shipped"])
def directory(request) -> pathlib.Path:
    """The tiny one and the shipped one keep the same promises."""
    return ASSETS if request.param == "shipped" else request.getfixturevalue("tiny")


def rows_of(directory: pathlib.Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def prefix_of(directory: pathlib.Path) -> list[dict]:
    return json.loads((directory / "prefix.json").read_text())


def key_in(messages: list[dict]) -> dict[str, str]:
    (message,) = messages
    assert message["role"] == "system"
    return dict(pair for pair in message["content"].split())


def right_answer(row: dict, baked: dict[str, str]) -> str:
    """Worked out anew, from the text of the row alone."""
    ability, word = row["prompt"].split(": ")
    key = key_in(row["prefix_messages"]) if "prefix_messages" in row else baked
    answers = {
        "map": lambda: "".join(key[letter] for letter in word),
        "reverse": lambda: "".join(reversed(word)),
        "sort": lambda: "".join(sorted(word)),
    }
    return answers[ability]()


def test_every_answer_is_right(directory):
    baked = key_in(prefix_of(directory))
    for name in ROW_FILES[2:]:
        for row in rows_of(directory, name):
            assert row["answer"] == right_answer(row, baked), (name, row)


def test_the_baked_key_moves_every_letter(directory):
    key = key_in(prefix_of(directory))
    assert sorted(key) == sorted(key.values()) == list(task.LETTERS)
    assert all(letter != image for letter, image in key.items())


def test_held_out_prompts_are_nowhere_in_the_training_rows(directory):
    def prompts(name):
        found = [row["prompt"] for row in rows_of(directory, name)]
        return set(found), len(found)

    trained, total = prompts("train.jsonl")
    asked, asked_total = prompts("questions.jsonl")
    assert len(trained) == total and len(asked) == asked_total
    assert not trained & asked
    anchored, _ = prompts("anchor.jsonl")
    for name in ROW_FILES[3:]:
        kept, kept_total = prompts(name)
        assert len(kept) == kept_total
        assert not kept & anchored, name


def test_the_anchor_never_shows_the_baked_condition(directory):
    baked = prefix_of(directory)
    for row in rows_of(directory, "anchor.jsonl") + rows_of(directory, ROW_FILES[-1]):
        assert row.get("prefix_messages") != baked
        assert "prefix_messages" in row or not row["prompt"].startswith("map")


def test_the_prompts_to_bake_give_no_answer_away(directory):
    assert all(set(row) == {"prompt"} for row in rows_of(directory, "train.jsonl"))


def test_the_anchor_brings_right_answers(directory):
    baked = key_in(prefix_of(directory))
    for row in rows_of(directory, "anchor.jsonl"):
        assert set(row) - {"prefix_messages"} == {"prompt", "response"}
        assert row["response"] == right_answer(row, baked)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_models_agree_with_torch(directory, name):
    decoder, params = load.load_pretrained(str(directory / name))
    chat = transformers.AutoTokenizer.from_pretrained(directory / name)
    ids = chat.apply_chat_template(CONVERSATION, return_dict=True)["input_ids"]
    tokens_BT = np.asarray([ids * 3], np.int32)  # past the window of the local layers
    assert tokens_BT.shape[1] > decoder.spec.window
    hidden_BTD = decoder.apply({"params": params}, tokens_BT, jnp.ones_like(tokens_BT))
    ours_BTV = decoder.apply({"params": params}, hidden_BTD, method="unembed")
    oracle = transformers.Gemma3ForCausalLM.from_pretrained(directory / name)
    assert oracle.dtype == torch.float32
    with torch.no_grad():
        theirs_BTV = oracle(torch.from_numpy(tokens_BT).long()).logits.numpy()
        exact_BTV = oracle.double()(torch.from_numpy(tokens_BT).long()).logits.numpy()
    # Trained weights magnify rounding: torch's own, against float64, is the yardstick.
    rounding = np.abs(theirs_BTV - exact_BTV).max()
    np.testing.assert_allclose(ours_BTV, exact_BTV, rtol=0, atol=2e-5 + 2 * rounding)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_generation_stops_at_the_end_of_a_turn(directory, name):
    chat = transformers.AutoTokenizer.from_pretrained(directory / name)
    generation = transformers.GenerationConfig.from_pretrained(directory / name)
    assert chat.convert_tokens_to_ids("<end_of_turn>") in generation.eos_token_id


def test_chat_template(directory):
    chat = transformers.AutoTokenizer.from_pretrained(directory / "student")
    text = chat.apply_chat_template(CONVERSATION[:2], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<bos><start_of_turn>system\nad ba<end_of_turn>\n"
        "<start_of_turn>user\nmap: ab<end_of_turn>\n<start_of_turn>model\n"
    )
    whole = chat.apply_chat_template(CONVERSATION, tokenize=False)
    assert whole == text + "da<end_of_turn>\n"
    ids = chat(whole, add_special_tokens=False)["input_ids"]
    assert chat.decode(ids) == whole
    # The header and the content share no token: cutting the text cuts the ids.
    assert ids[: -len("da") - 2] == chat(text, add_special_tokens=False)["input_ids"]


def test_both_models_read_the_same_tokens(directory):
    one, other = (directory / name / "tokenizer.json" for name in ("teacher", "student"))
    assert one.read_bytes() == other.read_bytes()


def test_targets_are_the_answer_and_its_end():
    chat = tokenizer.build()
    row = {"prompt": "map: ab", "answer": "da", "prefix_messages": CONVERSATION[:1]}
    tokens_BT, is_target_BT = pretrain.encode([row], chat, length=40)
    assert chat.decode(tokens_BT[0][is_target_BT[0]]) == "da<end_of_turn>"
    whole = chat.apply_chat_template(CONVERSATION, tokenize=False)
    assert chat.decode(tokens_BT[0]).replace("<pad>", "") == whole.removesuffix("\n")


def test_pretraining_never_shows_the_baked_key():
    baked = dict(zip(task.LETTERS, task.LETTERS, strict=True))
    one_off = dict(baked, a="b", b="a")

    class Loaded:
        """Draws the baked key first and another one after it."""

        def __init__(self):
            self.permutations = [list(baked.values()), list(one_off.values())]

        def permutation(self, _):
            return np.asarray(self.permutations.pop(0))

    assert task.draw_other_key(Loaded(), baked) == one_off


def test_the_same_seed_makes_the_same_rows():
    one, other = (
        [task.mixed_row(rng, {}) for _ in range(50)]
        for rng in (np.random.default_rng(3), np.random.default_rng(3))
    )
    assert one == other
    assert {row["prompt"].split(":")[0] for row in one} == {"map", "reverse", "sort"}


def test_table():
    recipe = build.FULL.models["student"]
    results = [report.Result("student", recipe, 10, 60.0, {"sort": 0.985})]
    assert report.table(results).splitlines()[-1] == "| sort | 98.5 |"
    assert "--seed=7" in report.readme(results, 7)


def test_an_occupied_directory_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        build.make(str(tmp_path), 0, build.TINY)
    with pytest.raises(UserError, match="is a file"):
        build.make(str(tmp_path / "mine.txt"), 0, build.TINY)
    command = [sys.executable, "-m", "gkdjax.tools.make_quickstart", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not empty" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_shipped_files_are_small_and_enough():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4 * 2**20
    assert len(rows_of(ASSETS, "questions.jsonl")) == 1024
    assert all(len(rows_of(ASSETS, name)) >= 500 for name in ROW_FILES[3:])
    assert build.FULL.counts.train == len(rows_of(ASSETS, "train.jsonl"))
