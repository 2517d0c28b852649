"""The check of a model directory: what it says of each family, and what it refuses."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import checkpoints
import factories
import pytest
import safetensors.torch
import torch
from checkpoints import KINDS, MULTIMODAL, tensors
from readme_commands import README, ROOMS

from gkdjax.tools import import_hf

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def check(directory, capsys) -> tuple[int, dict[str, str], str]:
    """(exit code, the table, stderr)."""
    code = import_hf.main(["--check", str(directory)])
    printed = capsys.readouterr()
    return code, dict(import_hf.describe(str(directory))) if code == 0 else {}, printed.err


@pytest.mark.parametrize("kind", KINDS)
def test_each_family_is_described(kind, tmp_path, capsys):
    source = checkpoints.make(tmp_path / "source", kind, "bfloat16", max_shard_size="40KB")
    capsys.readouterr()
    code = import_hf.main(["--check", source])
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    rows = dict(import_hf.describe(source))
    assert printed.out.splitlines()[-1] == "fits"
    for line, (what, value) in zip(printed.out.splitlines(), rows.items(), strict=False):
        assert line.startswith(what) and line.endswith(value)
    model = checkpoints.load_torch(source)
    text = model.model.language_model if kind == MULTIMODAL else model
    count = sum(weight.numel() for weight in text.parameters())  # torch counts a tied one once
    assert rows["parameters"] == f"{count:,}"
    family = "gemma3" if kind == MULTIMODAL else kind
    model_type = {"gemma3": "gemma3_text", MULTIMODAL: "gemma3"}.get(kind) or kind
    assert rows["family"] == f"{family} (model_type {model_type})"
    assert rows["width"] == ("64" if kind == "qwen2" else "48")
    assert rows["heads"] == "4 of 16, 2 for keys and values"
    assert (rows["ffn width"], rows["vocabulary"], rows["dtype"]) == ("80", "128 rows", "bfloat16")
    assert rows["tokenizer"] == "102 tokens, 26 rows of padding"
    assert rows["stop ids"] == "<end_of_turn> (5), <eos> (1)"
    assert rows["chat template"] == "ends a turn with <end_of_turn>"
    assert f"{2 * count / 1000:.2f} kB" in rows["tensors"]
    assert ("not of the text" in rows) == (kind == MULTIMODAL)
    local = "3, 2 of them local with a window of 5"
    assert rows["layers"] == (local if family == "gemma3" else "3")


def test_rope_scaling_and_a_head_of_its_own_are_told(tmp_path, capsys):
    llama = {"rope_parameters": factories.LLAMA3_ROPE, "tie_word_embeddings": False}
    source = checkpoints.make(tmp_path / "llama", "llama", **llama)
    _, rows, _ = check(source, capsys)
    assert rows["rope"] == (
        "theta 500,000, llama3: slow frequencies divided by 8, trained at 64 positions"
    )
    assert rows["head"] == "of its own"
    scaled = factories.rope_parameters(factor=8.0)
    source = checkpoints.make(tmp_path / "gemma3", "gemma3", rope_parameters=scaled)
    _, rows, _ = check(source, capsys)
    assert rows["rope"] == "theta 1,000,000, positions divided by 8"
    assert rows["rope, local layers"] == "theta 10,000, not scaled"
    assert rows["head"] == "tied to the embedding"


def test_a_key_that_nobody_reads_is_told(copy, capsys):
    edit_config(copy, rope_interleaved=True)
    _, rows, _ = check(copy, capsys)
    assert rows["not read"].startswith("rope_interleaved of config.json")


def test_dtypes_that_differ_are_told(tmp_path, capsys):
    source = checkpoints.make(tmp_path / "llama", "llama")
    mixed = {n: t if "norm" in n else t.bfloat16() for n, t in tensors(source).items()}
    safetensors.torch.save_file(mixed, pathlib.Path(source) / "model.safetensors")
    _, rows, _ = check(source, capsys)
    assert rows["dtype"] == "bfloat16 (68,352 numbers), float32 (336 numbers)"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    return checkpoints.make(tmp_path_factory.mktemp("whole") / "model", "gemma3")


@pytest.fixture
def copy(whole, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(whole, tmp_path / "model"))


def add_token(directory: pathlib.Path, token: str, special: bool, template: str = "") -> None:
    """Ids 102 to 128 are taken: the last one has no row in an embedding of 128."""
    tokenizer = factories.tokenizer()
    tokenizer.add_tokens([f"<unused{i}>" for i in range(26)], special_tokens=True)
    tokenizer.add_tokens([token], special_tokens=special)
    tokenizer.chat_template = template + tokenizer.chat_template
    tokenizer.save_pretrained(directory)


def test_a_special_token_without_a_row_is_told(copy, capsys):
    add_token(copy, "<image_soft_token>", special=True)
    code, rows, _ = check(copy, capsys)
    assert code == 0
    assert rows["tokenizer"] == "129 tokens, 0 rows of padding"
    assert rows[""] == "without a row, never use: '<image_soft_token>' (128)"


def edit_weights(change):
    def edit(directory):
        found = tensors(directory)
        change(found)
        safetensors.torch.save_file(found, directory / "model.safetensors")

    return edit


def edit_config(directory, **fields):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


REFUSED = {
    "no directory": (shutil.rmtree, "model"),
    "no config": (lambda d: (d / "config.json").unlink(), r"no config\.json"),
    "another architecture": (lambda d: edit_config(d, model_type="mamba"), "'mamba'.*qwen3"),
    "not causal": (lambda d: edit_config(d, is_causal=False), "is_causal = False changes what"),
    "a missing tensor": (edit_weights(lambda t: t.pop(Q_PROJ)), f"missing.*{Q_PROJ}"),
    "an unknown tensor": (edit_weights(lambda t: t.update(more=t[Q_PROJ].clone())), "more"),
    "a misshapen tensor": (
        edit_weights(lambda t: t.update({Q_PROJ: torch.zeros(3, 4)})),
        rf"{Q_PROJ}.*\(3, 4\)",
    ),
    "a NaN": (edit_weights(lambda t: t[Q_PROJ].view(-1)[-1:].fill_(torch.nan)), f"{Q_PROJ}.* NaN"),
    "truncated weights": (
        lambda d: (d / "model.safetensors").write_bytes(b"\0" * 40),
        r"model\.safetensors",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
    "no chat template": (lambda d: (d / "chat_template.jinja").unlink(), "no chat template"),
    "a word without a row": (lambda d: add_token(d, "word", special=False), r"'word' \(128\)"),
    "a template's token without a row": (
        lambda d: add_token(d, "<begin>", special=True, template="<begin>"),
        r"128 rows and none for 1 tokens of the tokenizer, '<begin>' \(128\)",
    ),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_what_does_not_fit_is_named(copy, capsys, damage):
    do, told = REFUSED[damage]
    assert check(copy, capsys)[0] == 0
    do(copy)
    code, _, error = check(copy, capsys)
    assert code == 2
    assert error.startswith("import_hf: ") and "Traceback" not in error
    assert re.search(told, error), error


def test_the_command_line(copy):
    command = [sys.executable, "-m", "gkdjax.tools.import_hf", f"--check={copy}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "family              gemma3 (model_type gemma3_text)\n" in done.stdout


def test_a_wrong_flag_is_told(capsys):
    with pytest.raises(SystemExit) as caught:
        import_hf.main(["--chek=x"])
    assert caught.value.code == 2
    assert "--check" in capsys.readouterr().err


def test_the_readmes_command_runs(monkeypatch, capsys):
    text = (ROOMS / "models" / "README.md").read_text()
    (line,) = (line for line in text.splitlines() if "tools.import_hf" in line)
    monkeypatch.chdir(README.parent)
    assert import_hf.main(line.partition("import_hf ")[2].split()) == 0
    assert capsys.readouterr().out.endswith("fits\n")
