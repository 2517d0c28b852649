"""The tool that makes tiny models with a large vocabulary."""

import json
import pathlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from gkdjax.data.chat_template import load_chat
from gkdjax.models.hf import load, model_config
from gkdjax.models.hf.tensor_files import TensorFiles
from gkdjax.models.sampler import sample
from gkdjax.tools.make_tiny import make_tiny
from gkdjax.types import SamplingParams
from gkdjax.utils.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
KNOWN_IDS = 105  # of the quickstart's tokenizer
SETTINGS = {"width": 32, "layers": 3, "vocab_size": 5000, "seed": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("models") / "above" / "tiny"
    make_tiny(directory, **SETTINGS)
    return directory


def contents(directory: pathlib.Path) -> dict[str, tuple[bytes, int]]:
    files = sorted(directory.rglob("*"))
    return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in files if f.is_file()}


def logits(directory: pathlib.Path, ids_BT: np.ndarray) -> np.ndarray:
    decoder, params = load.load_pretrained(str(directory), "float32")
    hidden = decoder.apply({"params": params}, ids_BT, np.ones_like(ids_BT, bool))
    return np.asarray(decoder.apply({"params": params}, hidden, method="unembed"))


def test_it_has_the_shape_that_was_asked_for(made):
    spec = model_config.load_spec(str(made))
    assert (spec.width, spec.vocab_size) == (32, 5000)
    assert spec.is_global_L == (False, True, False)
    assert spec.window < 64
    files = TensorFiles(made)
    assert {files.dtype(name).name for name in files.names} == {"bfloat16"}
    assert load_chat(str(made)).stop_ids == (5, 1)


def test_transformers_loads_it_and_agrees(made):
    model, report = transformers.Gemma3ForCausalLM.from_pretrained(
        made, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids_BT = np.random.default_rng(0).integers(0, KNOWN_IDS, (2, 70))
    with torch.no_grad():
        wanted = model.eval()(torch.tensor(ids_BT)).logits.numpy()
    # The rows that are never drawn reach -300, where float32 itself is coarser.
    np.testing.assert_allclose(logits(made, ids_BT), wanted, atol=2e-5, rtol=2e-6)


def test_ids_that_the_tokenizer_does_not_know_are_never_drawn(made):
    ids_BT = np.random.default_rng(1).integers(0, KNOWN_IDS, (4, 100))
    logits_BTV = logits(made, ids_BT)
    known = logits_BTV[..., :KNOWN_IDS]
    assert logits_BTV[..., KNOWN_IDS:].max() < known.min() - 30
    assert 0.5 < known.std() < 2  # and what is known is neither certain nor all the same


def test_no_adapter_can_bring_them_back(made):
    """Channel 0 is closed to every layer: whatever the kernels are, it carries what it did."""
    decoder, params = load.load_pretrained(str(made), "float32")
    rng = np.random.default_rng(2)
    layers = {
        name: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        if name.endswith("_proj")
        else leaf
        for name, leaf in params["layers"].items()
    }
    ids_BT = rng.integers(0, KNOWN_IDS, (4, 100))
    variables = {"params": params | {"layers": layers}}
    hidden_BTD = decoder.apply(variables, ids_BT, np.ones_like(ids_BT, bool))
    unchanged = decoder.apply({"params": params}, ids_BT, np.ones_like(ids_BT, bool))
    assert not np.allclose(hidden_BTD, unchanged, atol=0.1)  # the kernels did change something
    assert hidden_BTD[..., 0].min() >= 1


def test_the_sampler_draws_what_the_tokenizer_knows(made):
    decoder, params = load.load_pretrained(str(made))
    chat = load_chat(str(made))
    written = sample(
        decoder,
        params,
        [np.asarray([2, 4, 7], np.int32)] * 8,
        range(8),
        SamplingParams(max_new_tokens=24, temperature=1.0, top_p=1.0),
        stop_ids=chat.stop_ids,
        batch_size=8,
        lengths=(4,),
    )
    drawn = np.concatenate([completion.ids for completion in written])
    assert drawn.max() < KNOWN_IDS
    assert len(np.unique(drawn)) > 20


def test_a_second_call_leaves_it_alone(made):
    before = contents(made)
    make_tiny(made, **SETTINGS)
    assert contents(made) == before


def test_the_weights_follow_from_the_seed_alone(made, tmp_path):
    make_tiny(tmp_path / "same", **SETTINGS)
    make_tiny(tmp_path / "other", **SETTINGS | {"seed": 4})
    weights = [(d / "model.safetensors").read_bytes() for d in (made, *sorted(tmp_path.iterdir()))]
    assert weights[0] == weights[2] != weights[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("width", 64), ("layers", 2), ("vocab_size", 4999), ("seed", 4), ("dtype", "float32")],
)
def test_other_settings_are_refused_and_nothing_is_touched(made, name, value):
    before = contents(made)
    with pytest.raises(UserError, match=r"tiny.*other settings.*remove it"):
        make_tiny(made, **SETTINGS | {name: value})
    assert contents(made) == before


@pytest.mark.parametrize("missing", ["model.safetensors", "make_tiny.json", "tokenizer.json"])
def test_something_else_is_refused(made, tmp_path, missing):
    shutil.copytree(made, tmp_path / "copy")
    (tmp_path / "copy" / missing).unlink()
    with pytest.raises(UserError, match="is not a whole tiny model; remove it"):
        make_tiny(tmp_path / "copy", **SETTINGS)
    assert len(list((tmp_path / "copy").iterdir())) == len(list(made.iterdir())) - 1


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="remove it"):
        make_tiny(tmp_path / "file", **SETTINGS)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"width": 8}, "width = 8: must be at least 16"),
        ({"layers": 1}, "layers = 1: must be at least 2"),
        ({"vocab_size": 104}, "vocab_size = 104: must be at least 105"),
        ({"seed": -1}, "seed = -1"),
        ({"dtype": "float16"}, "choose one of float32, bfloat16"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, change, told):
    with pytest.raises(UserError, match=told):
        make_tiny(tmp_path / "tiny", **SETTINGS | change)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, data):
        raise OSError("no space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space"):
        make_tiny(tmp_path / "tiny", **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_make_one(made, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: make_tiny(tmp_path / "tiny", **SETTINGS), range(4)))
    assert [d.name for d in tmp_path.iterdir()] == ["tiny"]
    weights = "model.safetensors"
    assert (tmp_path / "tiny" / weights).read_bytes() == (made / weights).read_bytes()


def test_others_may_read_it_as_any_new_file(made, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    assert made.stat().st_mode == (tmp_path / "directory").stat().st_mode
    assert {f.stat().st_mode for f in made.iterdir()} == {(tmp_path / "file").stat().st_mode}


def test_the_command_line(tmp_path):
    command = [sys.executable, "-m", "gkdjax.tools.make_tiny", f"--out={tmp_path / 'tiny'}"]
    command += ["--vocab_size=200", "--width=16", "--layers=2", "--seed=7", "--dtype=float32"]
    subprocess.run(command, check=True, cwd=ROOT)
    assert json.loads((tmp_path / "tiny/make_tiny.json").read_text()) == {
        "width": 16,
        "layers": 2,
        "vocab_size": 200,
        "seed": 7,
        "dtype": "float32",
    }
    again = subprocess.run([*command, "--seed=8"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.startswith("make_tiny: ") and "Traceback" not in again.stderr
