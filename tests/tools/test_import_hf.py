"""The check of a model directory: its description of each family, and its refusals."""

import json
import pathlib
import re
import shutil

import checkpoints
import factories
import pytest
import safetensors.torch
import torch
from checkpoints import KINDS, MULTIMODAL, tensors
from readme_commands import README, ROOMS

from gkdjax.tools import import_hf

WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_each_family_is_described(kind, tmp_path, capsys):
    source = checkpoints.make(tmp_path / "source", kind, "bfloat16", max_shard_size="40KB")
    capsys.readouterr()
    assert import_hf.main(["--check", source]) == 0
    printed = capsys.readouterr()
    rows = dict(import_hf.describe(source))
    lines = printed.out.splitlines()
    assert lines[-1] == "fits" and printed.err == ""
    for line, (name, value) in zip(lines[:-1], rows.items(), strict=True):
        assert line.startswith(name) and line.endswith(value)
    model = checkpoints.load_torch(source)
    text = model.model.language_model if kind == MULTIMODAL else model
    count = sum(weight.numel() for weight in text.parameters())  # torch counts a tied one once
    family = "gemma3" if kind == MULTIMODAL else kind
    model_type = {"gemma3": "gemma3_text", MULTIMODAL: "gemma3"}.get(kind) or kind
    local = ", 2 of them local with a window of 5" if family == "gemma3" else ""
    wanted = {
        **{"family": f"{family} (model_type {model_type})", "parameters": f"{count:,}"},
        **{"width": "64" if kind == "qwen2" else "48", "ffn width": "80", "dtype": "bfloat16"},
        **{"heads": "4 of 16, 2 for keys and values", "vocabulary": "128 rows"},
        **{"tokenizer": "102 tokens, 26 rows of padding", "layers": f"3{local}"},
        "stop ids": "<end_of_turn> (5), <eos> (1)",
        "chat template": "ends a turn with <end_of_turn>",
    }
    assert rows | wanted == rows
    assert f"{2 * count / 1000:.2f} kB" in rows["tensors"]
    assert ("not of the text" in rows) == (kind == MULTIMODAL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    return checkpoints.make(tmp_path_factory.mktemp("whole") / "model", "gemma3")


@pytest.fixture
def copy(whole, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(whole, tmp_path / "model"))


def edit_weights(change):
    def edit(directory):
        found = tensors(directory)
        change(found)
        safetensors.torch.save_file(found, directory / WEIGHTS)

    return edit


def edit_config(**fields):
    def edit(directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | fields))

    return edit


def add_token(token: str, special: bool, template: str = ""):
    """Ids 102 to 128 are taken: the last one has no row in an embedding of 128."""

    def edit(directory):
        tokenizer = factories.tokenizer()
        tokenizer.add_tokens([f"<unused{i}>" for i in range(26)], special_tokens=True)
        tokenizer.add_tokens([token], special_tokens=special)
        tokenizer.chat_template = template + tokenizer.chat_template
        tokenizer.save_pretrained(directory)

    return edit


def low(found):
    found |= {name: t if "norm" in name else t.bfloat16() for name, t in found.items()}


def untie(found):
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()


SCALED = edit_config(rope_parameters=factories.rope_parameters(factor=8.0))
DESCRIBED = [
    (SCALED, {"rope": "theta 1,000,000, positions divided by 8"}),
    (SCALED, {"rope, local layers": "theta 10,000, not scaled", "head": "tied to the embedding"}),
    (
        lambda d: (edit_config(tie_word_embeddings=False)(d), edit_weights(untie)(d)),
        {"head": "of its own"},
    ),
    (
        edit_config(rope_interleaved=True),
        {"not read": "rope_interleaved of config.json, which transformers passes over too"},
    ),
    (edit_weights(low), {"dtype": "bfloat16 (68,352 numbers), float32 (720 numbers)"}),
    (
        add_token("<image_soft_token>", special=True),
        {
            "tokenizer": "129 tokens, 0 rows of padding",
            "": "without a row, never use: '<image_soft_token>' (128)",
        },
    ),
]


@pytest.mark.parametrize(("change", "wanted"), DESCRIBED)
def test_it_is_described(copy, change, wanted):
    change(copy)
    rows = dict(import_hf.describe(str(copy)))
    assert rows | wanted == rows


def test_llama_3s_rope_scaling_is_described(tmp_path):
    source = checkpoints.make(tmp_path, "llama", rope_parameters=factories.LLAMA3_ROPE)
    assert dict(import_hf.describe(source))["rope"] == (
        "theta 500,000, llama3: slow frequencies divided by 8, trained at 64 positions"
    )


def unlink(name: str):
    return lambda directory: (directory / name).unlink()


REFUSED = [
    (edit_config(is_causal=False), "is_causal = False changes what"),
    (edit_weights(lambda t: t.pop(Q_PROJ)), f"missing.*{Q_PROJ}"),
    (edit_weights(lambda t: t.update({Q_PROJ: torch.zeros(3, 4)})), rf"{Q_PROJ}.*\(3, 4\)"),
    (edit_weights(lambda t: t[Q_PROJ].view(-1)[-1:].fill_(torch.nan)), f"{Q_PROJ}.* NaN"),
    (unlink("tokenizer.json"), "tokenizer"),
    (unlink("chat_template.jinja"), "no chat template"),
    (add_token("word", special=False), r"'word' \(128\)"),
    (
        add_token("<begin>", special=True, template="<begin>"),
        r"128 rows and none for 1 tokens of the tokenizer, '<begin>' \(128\)",
    ),
]


@pytest.mark.parametrize(("damage", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_a_model_that_does_not_fit_is_named(copy, capsys, damage, named):
    damage(copy)
    assert import_hf.main(["--check", str(copy)]) == 2
    error = capsys.readouterr().err
    assert re.match(rf"import_hf: .*{named}", error), error


def test_the_readmes_command_runs(monkeypatch, capsys):
    text = (ROOMS / "models" / "README.md").read_text()
    (line,) = (line for line in text.splitlines() if "tools.import_hf" in line)
    monkeypatch.chdir(README.parent)
    assert import_hf.main(line.partition("import_hf ")[2].split()) == 0
    assert capsys.readouterr().out.endswith("fits\n")
