"""Whole runs on meshes that shard weights, rows and heads; conftest.py makes four devices."""

import factories
import numpy as np
import pytest
from small_runs import ConstantTeacher, losses, small

import gkdjax
from gkdjax.utils.errors import Preempted

HEADS = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
SHARDED = {"mesh__fsdp": 2, "mesh__tensor": 2}
PROMPTS = [{"prompt": "hi"}, {"prompt": "yo"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Student and teacher."""
    made = [tmp_path_factory.mktemp(name) for name in ("student", "teacher")]
    return [factories.model_dir(path, seed=seed, **HEADS) for seed, path in enumerate(made)]


def test_a_run_on_a_mesh_is_the_run_on_rows_alone(models, tmp_path):
    """All parts of it: both write, top k, anchor, validation, distances, side effects, exports."""
    student, other = models
    changes = {
        "teacher__backend": "flax",
        "teacher__model": other,
        "teacher__top_k": 5,
        "student__adapter": "none",
        "gkd__on_policy_fraction": 0.5,
        "anchor__data": PROMPTS * 2,
        "data__validation": [{"prompt": f"v {i}", "response": "ok"} for i in range(4)],
        "eval__prompts": PROMPTS,
        "eval__side_effects": [{"prompt": "unrelated"}],
        "eval__every_steps": 2,
    }
    expected = gkdjax.run(small(student, **changes), tmp_path / "rows")
    # The teacher's output projections are sharded along the other axis than the student's.
    rules = [{"leaves": "layers/(o|down)_proj", "axes": [None, "fsdp", "tensor"]}]
    c = small(student, **changes, **SHARDED, mesh__teacher_rules=rules)
    found = gkdjax.run(c, tmp_path / "sharded")
    both = [tmp_path / name for name in ("rows", "sharded")]
    np.testing.assert_allclose(*map(losses, both), rtol=1e-5, atol=1e-6)
    text, other_text = ((path / "samples.jsonl").read_text() for path in both)
    assert text == other_text
    for key in ("student", "reprompted_student", "side_effects"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6)


@pytest.mark.slow(60)
def test_a_run_goes_on_on_another_mesh(models, tmp_path):
    whole, moved = (tmp_path / name for name in ("whole", "moved"))
    c = small(models[0], teacher__top_k=1)
    gkdjax.run(c, whole, ConstantTeacher())
    with pytest.raises(Preempted):
        gkdjax.run(
            small(models[0], teacher__top_k=1, **SHARDED), moved, ConstantTeacher(stopped_at=2)
        )
    assert len(losses(moved)) < 4
    gkdjax.run(c, moved, ConstantTeacher())
    np.testing.assert_allclose(losses(moved), losses(whole), rtol=1e-5)
