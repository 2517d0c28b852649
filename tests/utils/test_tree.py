"""Names of leaves, and rules over them."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from gkdjax.utils import tree

PARAMS = {
    "embed": jnp.arange(4.0),
    "layers": {
        "q_proj": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)},
        "mlp": [jnp.ones(3), jnp.zeros(3)],
    },
}
PATHS = ["embed", "layers/mlp/0", "layers/mlp/1", "layers/q_proj/bias", "layers/q_proj/kernel"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    params: dict
    step: int


def test_paths_name_keys_indices_and_fields():
    assert jax.tree.leaves(tree.map_with_path(lambda path, leaf: path, PARAMS)) == PATHS
    names = tree.map_with_path(lambda path, leaf: path, State({"a": 1}, 2))
    assert names == State({"a": "params/a"}, "step")


def test_map_with_path_gives_the_leaf():
    scaled = tree.map_with_path(lambda path, leaf: leaf * (2 if "mlp" in path else 1), PARAMS)
    assert scaled["layers"]["mlp"][0][0] == 2
    chex.assert_trees_all_equal(scaled["layers"]["q_proj"], PARAMS["layers"]["q_proj"])


def test_match_takes_the_first_rule_that_fits_the_whole_path():
    found = tree.match(
        [("embed", PartitionSpec("data")), (r".*/q_proj/.*", PartitionSpec()), (".*", None)],
        PARAMS,
    )
    assert found["embed"] == PartitionSpec("data")
    assert found["layers"]["q_proj"] == {"kernel": PartitionSpec(), "bias": PartitionSpec()}
    assert found["layers"]["mlp"] == [None, None]


def test_match_names_a_rule_that_matches_nothing():
    with pytest.raises(ValueError, match=r"'q_proj' matches none of: embed, layers/mlp/0"):
        tree.match([("q_proj", 1), (".*", 2)], PARAMS)


def test_match_names_a_leaf_that_no_rule_covers():
    with pytest.raises(ValueError, match="no rule covers the leaf 'layers/q_proj/bias'"):
        tree.match([("embed", 1), (".*/mlp/.*", 2), (".*/kernel", 3)], PARAMS)
