"""Eight devices on four meshes against one: losses, gradients, text, memory and collectives.

mesh_steps.py computes all of it, in a process of its own: the number of devices is fixed at start.
"""

import json
import math
import os
import pathlib
import subprocess
import sys

import hlo
import numpy as np
import pytest

HERE = pathlib.Path(__file__).parents[1]
V, D, L, E = 512, 32, 3, 16  # as mesh_steps.py has them
ROWS, TARGETS = 8, 6
SLOW = pytest.mark.slow(100)
# Rows alone, and all three ways at once; the others divide in one way only.
FIRST, OTHERS = ("8x1x1", "2x2x2"), ("1x8x1", "1x1x8")
MESHES = [*FIRST, *(pytest.param(mesh, marks=SLOW) for mesh in OTHERS)]
LAYER_BYTES = 4 * (2 * 32 * 64 + 2 * 32 * 16 + 3 * 32 * 80)
LEAST = {"1x8x1": 5, "1x1x8": 4, "2x2x2": 3.5}  # batch, targets and norms are not divided by 8, 4


def compute(out: pathlib.Path, *meshes: str) -> pathlib.Path:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    command = [sys.executable, HERE / "mesh_steps.py", out, *meshes]
    subprocess.run(command, env=environment, check=True)
    return out


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> pathlib.Path:
    return compute(tmp_path_factory.mktemp("meshes"), "1x1x1", *FIRST)


@pytest.fixture(scope="module")
def others(first) -> pathlib.Path:
    return compute(first, *OTHERS)


@pytest.fixture
def computed(request) -> pathlib.Path:
    """Where the steps are, those of the other meshes only for a slow test."""
    slow = request.node.get_closest_marker("slow")
    return request.getfixturevalue("others" if slow else "first")


def facts(computed, mesh, case):
    return json.loads((computed / f"{mesh}-{case}.json").read_text())


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", ["lora", "full"])
def test_a_step_is_that_of_one_device_and_the_state_lies_as_before(computed, case, mesh):
    expected = np.load(computed / f"1x1x1-{case}.npz")
    found = np.load(computed / f"{mesh}-{case}.npz")
    assert found.files == expected.files
    for name in expected.files:
        scale = np.abs(expected[name]).max()
        assert scale > 1e-4  # a gradient that is nothing would be equal to anything
        np.testing.assert_allclose(found[name] / scale, expected[name] / scale, atol=1e-5)
    assert facts(computed, mesh, case)["moved"] == []
    if mesh in LEAST:  # a device holds its part of the weights
        whole, part = (facts(computed, each, case)["arguments"] for each in ("8x1x1", mesh))
        assert whole / LEAST[mesh] > part
    if mesh == "1x8x1":
        # One layer's weights and the tables' come and go; without remat all of them could stay.
        apart, gathered = (facts(computed, each, case)["temp"] for each in ("8x1x1", mesh))
        tables = 4 * V * (D + (E if case == "lora" else 0))
        assert gathered < apart + tables + 1.5 * LAYER_BYTES


@pytest.mark.parametrize("mesh", MESHES)
def test_text_is_that_of_one_device(computed, mesh):
    expected, found = (np.load(computed / f"{each}-text.npz") for each in ("1x1x1", mesh))
    np.testing.assert_array_equal(found["ids"], expected["ids"])
    np.testing.assert_array_equal(found["top_ids"], expected["top_ids"])
    np.testing.assert_allclose(found["logprobs"], expected["logprobs"], atol=1e-5)


def collectives(computed, mesh, case):
    """(kind, shape, in a loop) of all that devices exchange in a step."""
    every = hlo.collectives((computed / f"{mesh}-{case}.txt").read_text())
    return [(each.kind, shape, each.in_loop) for each in every for shape in each.shapes]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", ["lora", "full"])
def test_nothing_large_is_gathered(computed, mesh, case):
    """Never logits, never all layers; rows stay where they are unless attention is cut by heads."""
    every = collectives(computed, mesh, case)
    gathered = [shape for kind, shape, _ in every if kind == "all-gather"]
    assert (mesh == "8x1x1") == (not gathered)
    for shape in gathered:
        is_table = shape in ((V, D), (V // 2, D), (V, E), (V // 2, E))
        assert is_table or math.prod(shape) < min(L * D * 80 / 2, ROWS * TARGETS * V / 8), shape
        assert not (len(shape) == 3 and shape[0] == L), shape
    # One of each kernel, forward and backward, each within the loop over layers.
    one_layer = any(shape[0] == 1 and len(shape) == 3 for shape in gathered)
    assert one_layer == (mesh in ("1x8x1", "2x2x2"))


@pytest.mark.parametrize("mesh", MESHES)
def test_the_gradient_of_the_unembedding_is_reduced_once(computed, mesh):
    table = (V // {"1x1x8": 8, "2x2x2": 2}.get(mesh, 1), D)
    every = collectives(computed, mesh, "full")
    found = [loop for kind, shape, loop in every if kind != "all-gather" and shape == table]
    # One is the head's, one the look-up's: this model's embedding is tied. Cut by words alone,
    # each device has all tokens, and nothing is to be added up.
    assert found == ([] if mesh == "1x1x8" else [False, False])
