"""The tool that makes tiny models with a large vocabulary."""

import json
import pathlib
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from disks import longest_file

from gkdjax.data.chat_template import load_chat
from gkdjax.models.hf import load, model_config
from gkdjax.models.hf.tensor_files import TensorFiles
from gkdjax.models.sampler import sample
from gkdjax.tools import make_tiny as tool
from gkdjax.tools import tiny_mode
from gkdjax.tools.make_tiny import make_tiny
from gkdjax.types import SamplingParams
from gkdjax.utils.errors import NotWritten, UserError

KNOWN_IDS = 105  # of the quickstart's tokenizer
SETTINGS = {"width": 32, "layers": 3, "vocab_size": 5000, "seed": 3}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("models") / "above" / "tiny"
    make_tiny(directory, **SETTINGS)
    return directory


@pytest.fixture(scope="module")
def model(made):
    """(decoder, params), in float32."""
    return load.load_pretrained(str(made), "float32")


def contents(directory: pathlib.Path) -> dict[str, tuple[bytes, int]]:
    files = sorted(directory.rglob("*"))
    return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in files if f.is_file()}


def hidden(decoder, params, ids_BT: np.ndarray):
    return decoder.apply({"params": params}, ids_BT, np.ones_like(ids_BT, bool))


def logits(decoder, params, ids_BT: np.ndarray) -> np.ndarray:
    hidden_BTD = hidden(decoder, params, ids_BT)
    return np.asarray(decoder.apply({"params": params}, hidden_BTD, method="unembed"))


def test_it_is_a_model_of_its_settings_that_transformers_loads(made, model):
    spec = model_config.load_spec(str(made))
    assert (spec.width, spec.vocab_size) == (32, 5000)
    assert spec.is_global_L == (False, True, False) and spec.window < 64
    files = TensorFiles(made)
    assert {files.dtype(name).name for name in files.names} == {"bfloat16"}
    assert load_chat(str(made)).stop_ids == (5, 1)
    theirs, report = transformers.Gemma3ForCausalLM.from_pretrained(
        made, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids_BT = np.random.default_rng(0).integers(0, KNOWN_IDS, (2, 70))
    with torch.no_grad():
        wanted = theirs.eval()(torch.tensor(ids_BT)).logits.numpy()
    # The rows that are never sampled reach -300, where float32 itself is coarser.
    np.testing.assert_allclose(logits(*model, ids_BT), wanted, atol=2e-5, rtol=2e-6)


def test_ids_that_the_tokenizer_does_not_know_are_never_sampled(made, model):
    logits_BTV = logits(*model, np.random.default_rng(1).integers(0, KNOWN_IDS, (4, 100)))
    known = logits_BTV[..., :KNOWN_IDS]
    assert logits_BTV[..., KNOWN_IDS:].max() < known.min() - 30
    assert 0.5 < known.std() < 2  # and a known one is neither certain nor as likely as all
    written = sample(
        *load.load_pretrained(str(made)),
        [np.asarray([2, 4, 7], np.int32)] * 8,
        range(8),
        SamplingParams(max_new_tokens=24, temperature=1.0, top_p=1.0),
        stop_ids=load_chat(str(made)).stop_ids,
        batch_size=8,
        lengths=(4,),
    )
    ids = np.concatenate([completion.ids for completion in written])
    assert ids.max() < KNOWN_IDS and len(np.unique(ids)) > 20


def test_no_adapter_can_bring_them_back(model):
    """Channel 0 is closed to every layer: whatever the kernels are, it carries what it did."""
    decoder, params = model
    rng = np.random.default_rng(2)
    layers = dict(params["layers"])
    for name in [name for name in layers if name.endswith("_proj")]:
        layers[name] = jnp.asarray(rng.normal(size=layers[name].shape), layers[name].dtype)
    ids_BT = rng.integers(0, KNOWN_IDS, (4, 100))
    changed_BTD = hidden(decoder, params | {"layers": layers}, ids_BT)
    assert not np.allclose(changed_BTD, hidden(decoder, params, ids_BT), atol=0.1)
    assert changed_BTD[..., 0].min() >= 1


def test_the_weights_follow_from_the_seed_alone(made, tmp_path):
    with ThreadPoolExecutor(4) as pool:  # several at once make one
        list(pool.map(lambda _: make_tiny(tmp_path / "same", **SETTINGS), range(4)))
    make_tiny(tmp_path / "other", **SETTINGS | {"seed": 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "same"]
    weights = [(d / WEIGHTS).read_bytes() for d in (made, tmp_path / "same", tmp_path / "other")]
    assert weights[0] == weights[1] != weights[2]


OTHER = [{"width": 64}, {"layers": 2}, {"vocab_size": 4999}, {"seed": 4}, {"dtype": "float32"}]


def test_a_second_call_leaves_it_alone_and_other_settings_are_refused(made):
    before = contents(made)
    make_tiny(made, **SETTINGS)
    for other in OTHER:
        with pytest.raises(UserError, match=r"tiny.*other settings.*remove it"):
            make_tiny(made, **SETTINGS | other)
    assert contents(made) == before


@pytest.mark.parametrize("missing", [WEIGHTS, "make_tiny.json", "tokenizer.json"])
def test_anything_else_in_the_way_is_refused(made, tmp_path, missing):
    copy = pathlib.Path(shutil.copytree(made, tmp_path / "copy"))
    (copy / missing).rename(tmp_path / "file")
    for place in (copy, tmp_path / "file"):
        with pytest.raises(UserError, match="is not a whole tiny model; remove it"):
            make_tiny(place, **SETTINGS)
    assert len(list(copy.iterdir())) == len(list(made.iterdir())) - 1
    assert (tmp_path / "file").read_bytes() == (made / missing).read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"width": 8}, "width = 8: must be at least 16"),
        ({"layers": 1}, "layers = 1: must be at least 2"),
        ({"vocab_size": 104}, "vocab_size = 104: must be at least 105"),
        ({"seed": -1}, "seed = -1"),
        ({"dtype": "float16"}, "choose one of float32, bfloat16"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, change, named):
    with pytest.raises(UserError, match=named):
        make_tiny(tmp_path / "tiny", **SETTINGS | change)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_and_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_mode, "MODELS", tmp_path)
    text = tmp_path.with_suffix(".txt")
    text.write_text("many words\n" * 3)
    with longest_file(10):
        for write in (lambda: make_tiny(tmp_path / "a", **SETTINGS), _short(text)):
            with pytest.raises(NotWritten, match=r"cannot be written: File too large"):
                write()
    assert not any(tmp_path.iterdir())
    assert pathlib.Path(_short(text)()).read_text() == "many words\n" * 2


def _short(text: pathlib.Path):
    return lambda: tiny_mode.first_lines(str(text), 2)


def test_others_may_read_it_as_any_new_file(made, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    assert made.stat().st_mode == (tmp_path / "directory").stat().st_mode
    assert {f.stat().st_mode for f in made.iterdir()} == {(tmp_path / "file").stat().st_mode}


def test_the_flags(tmp_path, capsys):
    flags = [f"--out={tmp_path / 'tiny'}", "--width=16", "--layers=2", "--vocab_size=200"]
    assert tool.main([*flags, "--seed=7", "--dtype=float32"]) == 0
    assert json.loads((tmp_path / "tiny/make_tiny.json").read_text()) == {
        **{"width": 16, "layers": 2, "vocab_size": 200, "seed": 7, "dtype": "float32"}
    }
    assert tool.main([*flags, "--seed=8"]) == 2
    assert capsys.readouterr().err.startswith("make_tiny: ")
