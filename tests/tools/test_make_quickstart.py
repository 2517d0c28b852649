"""The tool that makes the embedded quickstart, in its tiny mode; and the shipped one."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from gkdjax.config import ASSETS
from gkdjax.models.hf import load
from gkdjax.tools.make_quickstart import __main__ as tool
from gkdjax.tools.make_quickstart import pretrain, task
from gkdjax.utils.errors import UserError

SHIPPED = ASSETS / "quickstart"
ANSWERED = ("questions", "retention/reverse", "retention/sort", "retention/other_keys")
CONVERSATION = [
    {"role": "system", "content": "ad ba"},
    {"role": "user", "content": "map: ab"},
    {"role": "assistant", "content": "da"},
]


@pytest.fixture(
    scope="module", params=[pytest.param("tiny", marks=pytest.mark.slow(60)), "shipped"]
)
def directory(request, tmp_path_factory) -> pathlib.Path:
    """The shipped directory, and a tiny one of today's tool: both keep the same promises."""
    if request.param == "shipped":
        return SHIPPED
    out = tmp_path_factory.mktemp("quickstart") / "made"
    tool.make(out, tiny=True)
    return out


def rows_of(directory: pathlib.Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def prompts_of(directory: pathlib.Path, name: str) -> list[str]:
    return [row["prompt"] for row in rows_of(directory, name)]


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
    if ability == "map":
        return "".join(key[letter] for letter in word)
    return {"reverse": word[::-1], "sort": "".join(sorted(word))}[ability]


def test_rows_have_right_answers_under_the_baked_key(directory):
    key = key_in(prefix_of(directory))
    assert sorted(key) == sorted(key.values()) == list(task.LETTERS)
    assert all(letter != image for letter, image in key.items())
    for name in ANSWERED:
        assert all(row["answer"] == right_answer(row, key) for row in rows_of(directory, name))
    assert all(set(row) == {"prompt"} for row in rows_of(directory, "train"))
    for row in rows_of(directory, "anchor"):
        assert set(row) - {"prefix_messages"} == {"prompt", "response"}
        assert row["response"] == right_answer(row, key)
    for row in rows_of(directory, "anchor") + rows_of(directory, ANSWERED[-1]):
        assert row.get("prefix_messages") != prefix_of(directory)  # never the baked condition
        assert "prefix_messages" in row or not row["prompt"].startswith("map")


def test_held_out_prompts_are_nowhere_in_the_training_rows(directory):
    for name, trained in dict.fromkeys(ANSWERED[1:], "anchor").items() | {("questions", "train")}:
        asked = prompts_of(directory, name)
        assert len({*asked}) == len(asked)
        assert not {*asked} & {*prompts_of(directory, trained)}, name
    trained = prompts_of(directory, "train")
    assert len({*trained}) == len(trained)


def test_the_shipped_data_is_made_by_this_tool_to_the_byte():
    baked = task.moving_key(np.random.default_rng((0, 0)))
    files = task.make_files(np.random.default_rng((0, 1)), baked, task.COUNTS)
    assert prefix_of(SHIPPED) == task.key_messages(baked)
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        assert (SHIPPED / name).read_text() == text, name
    assert len(files["questions.jsonl"]) == 1024
    assert all(len(rows_of(SHIPPED, name)) >= 500 for name in ANSWERED[1:])
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 4 * 2**20


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_models_agree_with_torch_and_stop_at_the_end_of_a_turn(directory, name):
    decoder, params = load.load_pretrained(directory / name)
    assert json.loads((directory / name / "config.json").read_text()) == pretrain.hf_config(
        tool.RECIPES[name]
    )
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
    generation = transformers.GenerationConfig.from_pretrained(directory / name)
    assert chat.convert_tokens_to_ids("<end_of_turn>") in generation.eos_token_id


def test_both_models_have_one_tokenizer_and_its_chat_template(directory):
    one, other = (directory / name / "tokenizer.json" for name in ("teacher", "student"))
    assert one.read_bytes() == other.read_bytes()
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


def test_targets_are_the_answer_and_its_end():
    chat = pretrain.build_tokenizer()
    row = {"prompt": "map: ab", "answer": "da", "prefix_messages": CONVERSATION[:1]}
    tokens_BT, is_target_BT = pretrain.encode([row], chat, length=40)
    assert chat.decode(tokens_BT[0][is_target_BT[0]]) == "da<end_of_turn>"
    whole = chat.apply_chat_template(CONVERSATION, tokenize=False)
    assert chat.decode(tokens_BT[0]).replace("<pad>", "") == whole.removesuffix("\n")


def test_pretraining_rows_follow_from_the_seed_and_never_show_the_baked_key():
    one, other = (
        [task.mixed_row(rng, {}) for _ in range(50)]
        for rng in (np.random.default_rng(3), np.random.default_rng(3))
    )
    assert one == other
    assert {row["prompt"].split(":")[0] for row in one} == {"map", "reverse", "sort"}
    baked = dict(zip(task.LETTERS, task.LETTERS, strict=True))
    one_off = dict(baked, a="b", b="a")

    class Loaded:
        """Gives the baked key first and another one after it."""

        def __init__(self):
            self.permutations = [list(baked.values()), list(one_off.values())]

        def permutation(self, _):
            return np.asarray(self.permutations.pop(0))

    assert task.other_key(Loaded(), baked) == one_off


def test_the_table_is_in_per_cent():
    table = tool.accuracy_table(["sort"], {"teacher": [1.0], "student": [0.985]})
    assert table == (
        "| exact match, % | teacher | student |\n| --- | --- | --- |\n| sort | 100.0 | 98.5 |"
    )
    assert table.splitlines()[0] in (SHIPPED / "README.md").read_text()


def test_an_occupied_directory_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        tool.make(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        tool.make(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
