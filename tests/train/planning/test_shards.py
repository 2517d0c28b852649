"""One device's part of a model, counted by hand."""

import dataclasses

import pytest
from jax.sharding import PartitionSpec
from planning_setups import STUDENT, setup

from gkdjax.train.planning import memory
from gkdjax.utils.errors import UserError

NORMS = 4 * 256 + 2 * 64  # of a layer
QUERIES, KEYS, MLP = 2 * 256 * 256, 2 * 256 * 64, 3 * 256 * 1024
TABLE = 4096 * 256


def shard(**mesh):
    return setup(devices=8, **{f"mesh__{axis}": size for axis, size in mesh.items()}).of_student


def test_each_axis_cuts_what_the_layout_says():
    kernels = QUERIES + KEYS + MLP
    assert shard().held == 6 * (kernels + NORMS) + 256 + TABLE
    assert shard(fsdp=8).held == 6 * (kernels // 8 + NORMS) + 256 + TABLE // 8
    # One head of keys and values cannot be cut in two.
    assert shard(tensor=2).held == 6 * (kernels // 2 + KEYS // 2 + NORMS) + 256 + TABLE // 2


def test_gathered_means_over_fsdp_alone():
    both = shard(fsdp=2, tensor=4)
    assert both.gathered == shard(tensor=4).held
    assert both.layer == QUERIES // 4 + KEYS + MLP // 4 + NORMS
    assert both.kernels == 6 * (both.layer - NORMS)
    assert both.table == TABLE // 4


def test_one_device_computes_its_heads_and_words():
    found = shard(tensor=4).local
    assert (found.num_heads, found.num_kv_heads) == (1, 1)
    assert (found.ffn_width, found.vocab_size, found.width) == (256, 1024, 256)
    assert shard(fsdp=8).local == STUDENT


@pytest.mark.parametrize(("heads", "kept"), [(8, 2), (2, 2)])
def test_keys_and_values_are_cut_where_their_heads_are(heads, kept):
    spec = dataclasses.replace(STUDENT, num_heads=8, num_kv_heads=heads)
    found = dataclasses.replace(shard(tensor=4), spec=spec)
    assert found.kv_numbers(10) == 2 * kept * 64 * 6 * 10


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    with pytest.raises(UserError, match="4 attention heads"):
        shard(tensor=8)
    with pytest.raises(UserError, match=r"config\.mesh: .*fsdp=3"):
        shard(fsdp=3)


def test_the_configs_own_rules_count():
    rules = [{"leaves": "layers/.*_proj", "axes": [None, None, None]}]
    of = setup(devices=8, mesh__fsdp=8, mesh__student_rules=rules)
    assert of.of_student.held - shard(fsdp=8).held == 6 * (QUERIES + KEYS + MLP) * 7 // 8
    assert of.of_student.layout.rules[0] == ("layers/.*_proj", PartitionSpec(None, None, None))


def test_fsdp_gathers_once_to_write_and_a_layer_at_a_time_to_train():
    mesh = {"devices": 8, "train__batch_size": 8, "gkd__on_policy_fraction": 1.0}
    plain, cut = setup(**mesh), setup(mesh__fsdp=8, **mesh)
    assert "weights, gathered" not in memory.sampling(plain)
    assert memory.sampling(cut)["weights, gathered"] == plain.of_student.held * 4
    before, after = memory.training_step(plain), memory.training_step(cut)
    # A table that lies whole on each device is used where it is.
    assert before["tables"] == 0 and after["tables"] == TABLE * 4
    assert before["activations"] == after["activations"]
    # The side of an adapter that meets its kernel's cut dimension is cut with it.
    whole, cut_sides = (256 + 2 * 64 + 2 * 1024) + (256 + 1024), 5 * 256 + 2 * 256
    assert memory.held(cut)["adapters"] == 6 * 64 * (whole + cut_sides // 8) * 4


def test_tensor_cuts_scores_and_logits_but_not_states():
    mesh = {"devices": 4, "train__batch_size": 8, "mesh__data": 1}
    rows, heads = setup(mesh__fsdp=4, **mesh), setup(mesh__tensor=4, **mesh)
    of_rows, of_heads = memory.training_step(rows), memory.training_step(heads)
    assert of_rows["activations"] < of_heads["activations"] < 4 * of_rows["activations"]
    assert memory.head(heads) * 4 == memory.head(rows) == rows.config.gkd.chunk_size * 4096 * 4
