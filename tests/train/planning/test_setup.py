"""A model's weights, known before they are read."""

import json
import pathlib
import shutil

import jax
import pytest

from gkdjax.models.hf import load
from gkdjax.train.planning.setup import read_weights
from gkdjax.utils.errors import UserError


def test_headers_say_what_loading_takes(student):
    _, params = load.load_pretrained(student)
    weights = read_weights(pathlib.Path(student))
    assert weights.stored_bytes == sum(x.nbytes for x in jax.tree.leaves(params))
    assert weights.stored_dtype == params["embedding"].dtype.name
    _, params = load.load_pretrained(student, "bfloat16")
    assert weights.nbytes("bfloat16") == sum(x.nbytes for x in jax.tree.leaves(params))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_without_weights_config_json_names_the_dtype(key, student, tmp_path):
    config = json.loads((pathlib.Path(student) / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    whole = read_weights(pathlib.Path(student))
    (tmp_path / "config.json").write_text(json.dumps(config | {key: "bfloat16"}))
    assert read_weights(tmp_path).stored_bytes == whole.nbytes("bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_weights(tmp_path).stored_dtype == "float32"
    (tmp_path / "config.json").write_text(json.dumps(config | {key: "int8"}))
    with pytest.raises(UserError, match=f"{key} 'int8' is not supported"):
        read_weights(tmp_path)


def test_a_config_that_cannot_be_read_is_named(student, tmp_path):
    shutil.copy(pathlib.Path(student) / "config.json", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        read_weights(tmp_path)
