"""Whole runs on meshes that cut weights, rows and heads; conftest.py makes four devices."""

import factories
import numpy as np
import pytest
from small_runs import ConstantTeacher, metrics, small

import gkdjax
from gkdjax import config
from gkdjax.data.chat_template import load_chat
from gkdjax.utils.errors import Preempted, UserError

HEADS = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
CUT = {"mesh__fsdp": 2, "mesh__tensor": 2}
PROMPTS = [{"prompt": "hi"}, {"prompt": "yo"}]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return factories.model_dir(tmp_path_factory.mktemp("student"), **HEADS)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return factories.model_dir(tmp_path_factory.mktemp("teacher"), seed=1, **HEADS)


def losses_of(workdir):
    return [line["loss"] for line in metrics(workdir)]


def test_a_run_on_a_mesh_is_the_run_on_rows_alone(student, other, tmp_path):
    """All parts of it: both write, top k, anchor, validation, distances, side effects, exports."""
    changes = {
        "teacher__backend": "flax",
        "teacher__model": other,
        "teacher__top_k": 5,
        "student__adapter": "none",
        "gkd__on_policy_fraction": 0.5,
        "anchor__data": PROMPTS * 2,
        "anchor__batch_size": 4,
        "data__validation": [{"prompt": f"v {i}", "response": "ok"} for i in range(4)],
        "eval__prompts": PROMPTS,
        "eval__side_effects": [{"prompt": "unrelated"}],
        "eval__every_steps": 2,
    }
    expected = gkdjax.run(small(student, **changes), tmp_path / "rows")
    # The teacher's output projections are cut along the other axis than the student's.
    rules = [{"leaves": "layers/(o|down)_proj", "axes": [None, "fsdp", "tensor"]}]
    c = small(student, **changes, **CUT, mesh__teacher_rules=rules)
    found = gkdjax.run(c, tmp_path / "cut")
    np.testing.assert_allclose(
        losses_of(tmp_path / "cut"), losses_of(tmp_path / "rows"), rtol=1e-5, atol=1e-6
    )
    text = [(tmp_path / name / "samples.jsonl").read_text() for name in ("rows", "cut")]
    assert text[0] == text[1]
    for key in ("student", "reprompted_student", "side_effects"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6)


def test_a_run_goes_on_on_another_mesh(student, tmp_path):
    stop = load_chat(student).stop_ids[0]
    whole = small(student, teacher__top_k=1)
    gkdjax.run(whole, tmp_path / "whole", ConstantTeacher(40, stop))
    with pytest.raises(Preempted):
        c = small(student, teacher__top_k=1, **CUT)
        gkdjax.run(c, tmp_path / "moved", ConstantTeacher(40, stop, stopped_at=2))
    assert len(metrics(tmp_path / "moved")) < 4
    gkdjax.run(whole, tmp_path / "moved", ConstantTeacher(40, stop))
    np.testing.assert_allclose(
        losses_of(tmp_path / "moved"), losses_of(tmp_path / "whole"), rtol=1e-5
    )


def test_rows_that_the_mesh_cannot_share_are_refused(student, tmp_path):
    c = small(student, train__batch_size=6, mesh__fsdp=4)
    with pytest.raises(UserError, match=r"config.train.batch_size: 6 rows .* by 4 devices"):
        gkdjax.run(c, tmp_path)


def test_a_mesh_of_more_devices_than_there_are_is_refused(student, tmp_path):
    with pytest.raises(UserError, match=r"config.mesh: tensor=3 needs a multiple of 3 devices"):
        gkdjax.run(config.parse(small(student, mesh__tensor=3)), tmp_path)
