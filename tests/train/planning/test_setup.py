"""A model's weights, known before they are read, and one device's part of them."""

import dataclasses
import json
import pathlib

import jax
import pytest
from jax.sharding import PartitionSpec
from planning_setups import STUDENT, setup

from gkdjax.models.hf import load
from gkdjax.train.planning import memory
from gkdjax.train.planning.setup import read_weights
from gkdjax.utils.errors import UserError

NORMS = 4 * 256 + 2 * 64  # of a layer
QUERIES, KEYS, MLP = 2 * 256 * 256, 2 * 256 * 64, 3 * 256 * 1024
TABLE = 4096 * 256


def test_headers_say_what_loading_takes(student):
    weights = read_weights(pathlib.Path(student))
    _, params = load.load_pretrained(student)
    assert weights.stored_dtype == params["embedding"].dtype.name
    for dtype in (None, "bfloat16"):
        _, params = load.load_pretrained(student, dtype)
        assert weights.nbytes(dtype) == sum(x.nbytes for x in jax.tree.leaves(params))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_without_weights_config_json_names_the_dtype(key, student, tmp_path):
    fields = json.loads((pathlib.Path(student) / "config.json").read_text())
    fields = {k: v for k, v in fields.items() if k not in ("dtype", "torch_dtype")}

    def read(**more):
        (tmp_path / "config.json").write_text(json.dumps(fields | more))
        return read_weights(tmp_path)

    whole = read_weights(pathlib.Path(student))
    assert read(**{key: "bfloat16"}).stored_bytes == whole.nbytes("bfloat16")
    assert read().stored_dtype == "float32"
    with pytest.raises(UserError, match=f"{key} 'int8' is not supported"):
        read(**{key: "int8"})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        read_weights(tmp_path)


def shard(**mesh):
    return setup(devices=8, **{f"mesh__{axis}": size for axis, size in mesh.items()}).of_student


def test_each_axis_divides_what_the_rules_say():
    kernels = QUERIES + KEYS + MLP
    assert shard().held == 6 * (kernels + NORMS) + 256 + TABLE
    assert shard(fsdp=8).held == 6 * (kernels // 8 + NORMS) + 256 + TABLE // 8
    # One head of keys and values cannot be divided.
    assert shard(tensor=2).held == 6 * (kernels // 2 + KEYS // 2 + NORMS) + 256 + TABLE // 2
    own = {"leaves": "layers/.*_proj", "axes": [None, None, None]}  # the config's rules come first
    found = setup(devices=8, mesh__fsdp=8, mesh__student_rules=[own]).of_student
    assert found.held - shard(fsdp=8).held == 6 * kernels * 7 // 8
    assert found.layout.rules[0] == ("layers/.*_proj", PartitionSpec(None, None, None))


def test_weights_are_gathered_over_fsdp_alone():
    both = shard(fsdp=2, tensor=4)
    assert both.gathered == shard(tensor=4).held
    assert both.layer == QUERIES // 4 + KEYS + MLP // 4 + NORMS
    assert both.kernels == 6 * (both.layer - NORMS) and both.table == TABLE // 4


def test_one_device_computes_its_heads_and_its_part_of_the_vocabulary():
    found = shard(tensor=4).local
    assert (found.num_heads, found.num_kv_heads) == (1, 1)
    assert (found.ffn_width, found.vocab_size, found.width) == (256, 1024, 256)
    assert shard(fsdp=8).local == STUDENT
    for heads in (8, 2):  # keys and values are divided where their heads are
        spec = dataclasses.replace(STUDENT, num_heads=8, num_kv_heads=heads)
        divided = dataclasses.replace(shard(tensor=4), spec=spec)
        assert divided.kv_numbers(10) == 2 * 2 * 64 * 6 * 10


@pytest.mark.parametrize(
    ("mesh", "message"),
    [({"tensor": 8}, "4 attention heads"), ({"fsdp": 3}, r"config\.mesh: .*fsdp=3")],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(mesh, message):
    with pytest.raises(UserError, match=message):
        shard(**mesh)


def test_fsdp_gathers_once_to_write_and_a_layer_at_a_time_to_train():
    mesh = {"devices": 8, "train__batch_size": 8, "gkd__on_policy_fraction": 1.0}
    plain, sharded = setup(**mesh), setup(mesh__fsdp=8, **mesh)
    assert "weights, gathered" not in memory.sampling(plain)
    assert memory.sampling(sharded)["weights, gathered"] == plain.of_student.held * 4
    before, after = memory.training_step(plain), memory.training_step(sharded)
    # A replicated table is used where it is.
    assert before["tables"] == 0 and after["tables"] == TABLE * 4
    assert before["activations"] == after["activations"]
    # The side of an adapter that meets its kernel's sharded dimension is sharded with it.
    whole, sides = (256 + 2 * 64 + 2 * 1024) + (256 + 1024), 5 * 256 + 2 * 256
    assert memory.held(sharded)["adapters"] == 6 * 64 * (whole + sides // 8) * 4


def test_tensor_shards_scores_and_logits_but_not_states():
    mesh = {"devices": 4, "train__batch_size": 8, "mesh__data": 1}
    rows, heads = setup(mesh__fsdp=4, **mesh), setup(mesh__tensor=4, **mesh)
    of_rows, of_heads = memory.training_step(rows), memory.training_step(heads)
    assert of_rows["activations"] < of_heads["activations"] < 4 * of_rows["activations"]
    assert memory.head(heads) * 4 == memory.head(rows) == rows.config.gkd.chunk_size * 4096 * 4
