"""Exports of a run's saved steps are the run's own exports."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from checkpoints import assert_same_bytes, load_torch, tensors, torch_logits
from readme_commands import ROOMS
from small_runs import ConstantTeacher, small

import gkdjax
from gkdjax.tools import export_hf
from gkdjax.utils.errors import Preempted

TEXT = ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE")
FILES = {
    "merged": ("model.safetensors", "config.json", "USE_POLICY.md", *TEXT),
    "adapter": ("adapter_model.safetensors", "adapter_config.json", "USE_POLICY.md", *TEXT),
}


def export(run, out, *flags: str) -> int:
    return export_hf.main([f"--checkpoint={run}", f"--out={out}", *flags])


@pytest.fixture(scope="module")
def lora_run(student, tmp_path_factory) -> pathlib.Path:
    """Saved at steps 2 and 4; at step 2 it was stopped, and exported to "stopped".

    The student's generation_config.json does not have the chat template's end of turn.
    """
    root = tmp_path_factory.mktemp("lora")
    base = shutil.copytree(student, root / "student")
    (base / "generation_config.json").write_text('{"eos_token_id": 1}')
    for name in ("LICENSE", "USE_POLICY.md"):
        (base / name).write_text(f"{name} of the student")
    config = small(str(base), teacher__top_k=1, train__export="both")
    config.student.lora.alpha = 7.0
    with pytest.raises(Preempted):
        gkdjax.run(config, root / "run", teacher=ConstantTeacher(50, 5, stopped_at=2))
    assert export(root / "run", root / "stopped") == 0
    gkdjax.run(config, root / "run", teacher=ConstantTeacher(50, 5))
    return root / "run"


@pytest.fixture
def run(lora_run, tmp_path) -> pathlib.Path:
    """A copy to change."""
    return pathlib.Path(shutil.copytree(lora_run, tmp_path / "run"))


@pytest.mark.parametrize(
    ("flags", "kind"),
    [([], "merged"), (["--merged", "--step=4"], "merged"), (["--adapter"], "adapter")],
)
def test_the_last_step_is_the_runs_own_export(lora_run, tmp_path, capsys, flags, kind):
    assert export(lora_run, tmp_path / "out", *flags) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: step 4 of {lora_run}\n"
    for name in FILES[kind]:
        ours, runs = (d / name for d in (tmp_path / "out", lora_run / kind))
        assert ours.read_bytes() == runs.read_bytes(), name
    if kind == "adapter":
        fields = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert (fields["r"], fields["lora_alpha"]) == (2, 7.0)


def test_an_earlier_step_is_the_run_at_that_time(lora_run, tmp_path):
    assert export(lora_run, tmp_path / "out", "--step=2") == 0
    assert_same_bytes(tmp_path / "out", lora_run.parent / "stopped")
    early, late = (torch_logits(load_torch(d)) for d in (tmp_path / "out", lora_run / "merged"))
    assert np.abs(early - late).max() > 0.01


def test_exports_stop_where_the_run_did(run, tmp_path):
    def stops(directory) -> list[int]:
        return json.loads((directory / "generation_config.json").read_text())["eos_token_id"]

    assert stops(run / "merged") == stops(run / "adapter") == [5, 1]
    (run / "ending.json").write_text('{"stop_ids": [5, 1, 9], "pad_id": 0}')  # a teacher's, too
    assert export(run, tmp_path / "out") == 0 and stops(tmp_path / "out") == [5, 1, 9]
    (run / "ending.json").unlink()  # an older run
    assert export(run, tmp_path / "out") == 0 and stops(tmp_path / "out") == [5, 1]


def test_every_parameter_of_a_full_fine_tuning_is_exported(student, tmp_path, capsys):
    run = tmp_path / "run"
    config = small(student, teacher__top_k=1, student__adapter="none")
    gkdjax.run(config, run, teacher=ConstantTeacher(50, 5))
    assert export(run, tmp_path / "out") == 0
    assert_same_bytes(tmp_path / "out", run / "merged")
    endings = [d / "generation_config.json" for d in (tmp_path / "out", run / "merged")]
    assert endings[0].read_bytes() == endings[1].read_bytes()
    before, after = tensors(student), tensors(tmp_path / "out")
    assert all((after[name] != before[name]).any() for name in before if "proj" in name)
    assert export(run, tmp_path / "adapter", "--adapter") == 2
    assert "trained every parameter" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


def damage(run: pathlib.Path, leaf: str) -> None:
    """Changes the fingerprint of a leaf, as if a bit of the leaf had flipped."""
    path = run / "checkpoints/4/meta/metadata"
    meta = json.loads(path.read_text())
    (damaged,) = [name for name in meta["fingerprints"] if name.endswith(leaf)]
    meta["fingerprints"][damaged] ^= 1
    path.write_text(json.dumps(meta))


def test_a_damaged_or_unfinished_newest_step_is_passed_over(lora_run, run, tmp_path, capsys):
    damage(run, "0/mu/layers/q_proj/a")  # the optimizer's are not exported
    (run / "checkpoints/6.orbax-checkpoint-tmp").mkdir()  # a save that is going on
    assert export(run, tmp_path / "out") == 0
    assert_same_bytes(tmp_path / "out", lora_run / "merged")
    damage(run, "trainable/layers/q_proj/a")
    before = sorted(run.rglob("*"))
    assert export(run, tmp_path / "no", "--step=4") == 2
    printed = capsys.readouterr().err
    assert "no checkpoint" in printed and "trainable/layers/q_proj/a" in printed
    assert export(run, tmp_path / "out") == 0
    assert "step 2 of" in capsys.readouterr().out
    assert_same_bytes(tmp_path / "out", lora_run.parent / "stopped")
    assert sorted(run.rglob("*")) == before


def test_only_its_own_kind_of_directory_is_replaced(lora_run, run, tmp_path, capsys):
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    assert export(lora_run, out, "--step=2") == 0  # an empty one is
    assert export(lora_run, out) == 0
    assert_same_bytes(out, lora_run / "merged")
    work.mkdir()
    (work / "thesis.tex").touch()
    (tmp_path / "file").write_text("text")
    for other in (work, run, tmp_path / "file", lora_run / "adapter", tmp_path):
        assert export(run, other) == 2
        assert "is there and not the directory of a model" in capsys.readouterr().err
    assert export(run, out, "--adapter") == 2
    assert "not the directory of an adapter" in capsys.readouterr().err
    assert export(run, lora_run.parent / "student") == 2
    assert "is what the run began with" in capsys.readouterr().err
    begun_with = run / "models.json"  # a relative name, and the place that it was found at
    places = json.loads(begun_with.read_text()) | {"an/adapter": str(run / "adapter")}
    begun_with.write_text(json.dumps(places))
    assert export(run, run / "adapter", "--adapter") == 2
    assert "is what the run began with" in capsys.readouterr().err
    assert (work / "thesis.tex").exists() and (run / "checkpoints").exists()


def test_the_readmes_commands_are_ours(lora_run, tmp_path):
    text = (ROOMS / "models" / "README.md").read_text()
    lines = [line.split() for line in text.splitlines() if "tools.export_hf" in line]
    assert len(lines) == 2
    for _, _, module, run, out, *flags in lines:
        assert (module, run[:13], out[:6]) == ("gkdjax.tools.export_hf", "--checkpoint=", "--out=")
        flags = [flag.replace("300", "4") for flag in flags]
        assert export(lora_run, tmp_path / flags[0], *flags) == 0


def test_a_run_finds_its_model_from_anywhere(student, tmp_path, monkeypatch, capsys):
    shutil.copytree(student, tmp_path / "here/model")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = small("model", teacher__top_k=1, train__steps=1, train__export="adapter")
    gkdjax.run(config, tmp_path / "run", teacher=ConstantTeacher(50, 5))
    saved = json.loads((tmp_path / "run/config.json").read_text())
    del saved["teacher"]["prefix_bytes"], saved["log"]  # a run from before these keys
    (tmp_path / "run/config.json").write_text(json.dumps(saved))
    monkeypatch.chdir(tmp_path / "there")
    assert export(tmp_path / "run", "out") == 0
    assert export(tmp_path / "run", "adapter", "--adapter") == 0
    fields = json.loads(pathlib.Path("adapter/adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(tmp_path / "here/model")
    (tmp_path / "here/model").rename(tmp_path / "here/moved")
    assert export(tmp_path / "run", "out") == 2
    assert f"{tmp_path / 'here/model'} is gone" in capsys.readouterr().err


def test_a_missing_run_or_step_is_named(run, student, tmp_path, capsys):
    def error(run, *flags) -> str:
        assert export(run, tmp_path / "out", *flags) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "holds no step 3; there are [2, 4]" in error(run, "--step=3")
    assert "holds no config.json, so it is not a run's" in error(tmp_path / "nothing")
    assert "config.json is not a run's" in error(student)
    shutil.rmtree(run / "checkpoints")
    assert "holds no checkpoint" in error(run)
    fields = json.loads((run / "config.json").read_text())
    fields["student"]["model"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(fields))
    assert str(tmp_path / "gone") in error(run)
    (run / "config.json").write_text("{")
    assert "config.json does not parse" in error(run)
