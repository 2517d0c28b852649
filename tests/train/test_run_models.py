"""Whole runs with models from the hub, starting adapters, and teachers that carry one."""

import datetime
import json
import logging
import pathlib
import shutil

import builders
import factories
import numpy as np
import pytest
import safetensors.numpy
from small_runs import losses, metrics, small

import gkdjax
from gkdjax import config
from gkdjax.models import lora
from gkdjax.models.hf import export, load, model_config, peft
from gkdjax.tools.export_hf import export_step
from gkdjax.train import models, workdir
from gkdjax.types import Message
from gkdjax.utils.errors import UserError

TARGETS = ("k_proj", "q_proj")
NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture(scope="module")
def adapters(student, other, tmp_path_factory) -> dict[str, str]:
    """PEFT directories of rank 2 and alpha 3, on two kernels of each base; one of two ranks."""
    made = tmp_path_factory.mktemp("adapters")
    for name, base in {"student": student, "other": other, "mixed": student}.items():
        decoder, _ = load.load_pretrained(base)
        leaves = builders.adapters(decoder, names=TARGETS)
        if name == "mixed":
            leaves |= builders.adapters(decoder, names=["k_proj"], rank=3)
        export.export_adapter(made / name, decoder.spec, leaves, base)
    return {path.name: str(path) for path in made.iterdir()}


def starting_from(student: str, directory: str, **changes):
    lora_changes = {"init_from": directory, "alpha": 3.0, "targets": TARGETS}
    return small(student, **{f"student__lora__{k}": v for k, v in lora_changes.items()} | changes)


def merged(base: str, adapter: str, out: pathlib.Path) -> str:
    decoder, params = load.load_pretrained(base)
    leaves = peft.load_adapter(adapter, decoder.spec).adapters
    export.export_merged(out, decoder.spec, params, leaves, base)
    return str(out)


def test_a_run_goes_on_from_a_peft_adapter(student, adapters, tmp_path):
    c = starting_from(student, adapters["student"], train__steps=1, train__export="both")
    c.optim.learning_rate, c.anchor.data = 1e-9, [{"prompt": "other"}]
    gkdjax.run(c, tmp_path)
    spec = model_config.load_spec(student)
    start, end = (
        peft.load_adapter(path, spec).adapters
        for path in (adapters["student"], tmp_path / "adapter")
    )
    assert start.keys() == end.keys()
    for path in start:
        np.testing.assert_allclose(end[path].b, start[path].b, atol=1e-7)
        assert end[path].scale == start[path].scale
    # The student as it was is the base with the adapter: the anchor finds no distance yet.
    assert metrics(tmp_path)[0]["anchor_loss"] == pytest.approx(0.0, abs=1e-6)
    (_, base), (_, new) = (load.load_pretrained(path) for path in (student, tmp_path / "merged"))
    wanted = lora.merge(base, start)["layers"]["q_proj"]
    np.testing.assert_allclose(new["layers"]["q_proj"], wanted, atol=1e-6)


def test_before_training_the_student_answers_with_its_starting_adapter(student, adapters, tmp_path):
    changes = {"train__steps": 1, "eval__prompts": [{"prompt": "ask 1"}, {"prompt": "ask 7"}]}
    changes |= {"teacher__backend": "flax", "teacher__model": student}
    whole = merged(student, adapters["student"], tmp_path / "merged")
    found = []
    for c in (starting_from(student, adapters["student"], **changes), small(whole, **changes)):
        results = gkdjax.run(c, tmp_path / f"run {len(found)}")
        found.append([results[who]["forward_kl"] for who in ("base", "prompted_base")])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert min(found[0]) > 1e-2  # the teacher is the base without the adapter


IS_ADAPTER = r"is the directory of an adapter.*student\.lora\.init_from or teacher\.ada"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student__lora__init_from": "student", "student__lora__rank": 4},
            r"rank=2, \.alpha=3\.0 and \.targets=\('k_proj', 'q_proj",
        ),
        ({"student__lora__init_from": "mixed"}, r"several ranks or alphas \(rank_pattern"),
        ({"student__lora__init_from": "other"}, "another base"),
        ({"student__model": "student"}, IS_ADAPTER),
        ({"teacher__backend": "flax", "teacher__model": "student"}, IS_ADAPTER),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(student, adapters, tmp_path, changes, message):
    changes = {key: adapters.get(value, value) for key, value in changes.items()}
    with pytest.raises(UserError, match=message):
        gkdjax.run(starting_from(student, "", **changes), tmp_path / "run")


def test_a_teacher_may_carry_an_adapter(student, other, adapters, tmp_path):
    whole, found = merged(other, adapters["other"], tmp_path / "merged"), []
    for model, adapter in ((other, adapters["other"]), (whole, ""), (other, "")):
        c = small(student, train__steps=1, teacher__backend="flax", teacher__model=model)
        c.data.train, c.teacher.adapter = [{"prompt": "ask", "response": "told"}] * 4, adapter
        gkdjax.run(c, tmp_path / f"run {len(found)}")
        found += losses(tmp_path / f"run {len(found)}")
    assert found[0] == pytest.approx(found[1], abs=1e-5) and abs(found[0] - found[2]) > 1e-2


def test_the_base_with_another_adapter_may_teach_without_a_prefix(student, adapters, tmp_path):
    c = small(student, train__steps=1, context__prefix_messages=())
    c.teacher.adapter = adapters["student"]
    gkdjax.run(c, tmp_path)
    assert losses(tmp_path)[0] > 1e-2


@pytest.mark.parametrize("key", ["model", "tokenizer"])
def test_the_tokenizer_of_a_directory_is_read_once(student, tmp_path, monkeypatch, key):
    """Student and teacher may name one directory; a large vocabulary takes seconds to read."""
    read, once = models.load_chat, []
    monkeypatch.setattr(models, "load_chat", lambda *how: once.append(how) or read(*how))
    c = small(student, teacher__api_base=NOWHERE if key == "tokenizer" else "")
    c.teacher.backend, c.teacher[key] = "vllm" if key == "tokenizer" else "flax", student
    found = models.resolve_models(config.parse(c), tmp_path, None)
    assert len(once) == 1 and found.chat.tokenizer is found.teacher_chat.tokenizer


def test_a_teacher_may_borrow_a_tokenizer(student, other, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(pathlib.Path(other, name), bare)
    c = small(student, train__steps=1, teacher__backend="flax", teacher__model=str(bare))
    with pytest.raises(UserError, match="bare"):
        gkdjax.run(c, tmp_path / "without")
    c.teacher.tokenizer = other
    gkdjax.run(c, tmp_path / "with")
    assert losses(tmp_path / "with")[0] > 0


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> tuple[str, str]:
    """Two teachers of the same weights: the student's tokenizer, and two added tokens beside it.

    The second has a row for each, and prefers the first of them to the other's favourite, "<";
    eight rows more are no token.
    """
    plain, more = (tmp_path_factory.mktemp(name) for name in ("plain", "more"))
    factories.model_dir(more, seed=1, hidden_size=32, vocab_size=112)
    shutil.copytree(more, plain, dirs_exist_ok=True)
    added = factories.tokenizer()
    known = len(added)
    added.add_tokens(["<think>", "</think>"])
    added.save_pretrained(more)
    weights = safetensors.numpy.load_file(more / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    table[known] = 1.2 * table[added.convert_tokens_to_ids("<")]
    for directory, rows in ((plain, known), (more, 112)):
        weights["model.embed_tokens.weight"] = table[:rows]
        safetensors.numpy.save_file(weights, directory / "model.safetensors", {"format": "pt"})
        fields = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(fields | {"vocab_size": rows}))
    return str(plain), str(more)


@pytest.mark.slow(20)
def test_a_teacher_with_added_tokens_teaches_those_that_the_student_has(
    student, grown, tmp_path, caplog
):
    """Over the whole vocabulary what both have counts: both teachers give the same losses.

    The best K lose what only the teacher has, and with it most of their mass.
    """
    known, found = len(factories.tokenizer()), {}
    for name, model, top_k in (("without", 0, None), ("dense", 1, None), ("top_k", 1, 3)):
        c = small(student, train__steps=2, gkd__on_policy_fraction=0.5)
        c.teacher.backend, c.teacher.model, c.teacher.top_k = "flax", grown[model], top_k
        if top_k is not None:
            c.eval.prompts = [{"prompt": "ask 7"}]
        caplog.clear()
        with caplog.at_level(logging.WARNING, "absl"):
            found[name] = gkdjax.run(c, tmp_path / name)
        warned = caplog.text.count(f"part at id {known}, '<think>' in the teach")
        assert warned == model  # once, where it is so
        for file in ("trajectories_train.jsonl", "trajectories_student.jsonl"):
            lines = (tmp_path / name / file).read_text().splitlines()
            assert max(max(json.loads(line)["ids"]) for line in lines) < known
    dense, without = (losses(tmp_path / name) for name in ("dense", "without"))
    assert dense == pytest.approx(without, rel=1e-5)
    # The teacher's best token is none of the student's: its mass is outside of the K.
    assert found["top_k"]["student"]["top1_agreement"] == 0 < losses(tmp_path / "top_k")[1]
    assert found["top_k"]["student"]["teacher_top_k_mass"] < 0.3


@pytest.mark.parametrize(("backend", "key"), [("flax", "model"), ("vllm", "tokenizer")])
def test_a_teacher_that_ends_turns_where_the_student_runs_on_is_refused(
    student, other, tmp_path, backend, key
):
    base = shutil.copytree(student, tmp_path / "base")
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("<end_of_turn>", "<eos>"))
    (base / "generation_config.json").write_text('{"eos_token_id": 1}')
    c = small(str(base), teacher__backend=backend, **{f"teacher__{key}": other})
    if backend == "vllm":
        c.teacher.api_base = NOWHERE
    message = rf"\({other}\) ends a turn with <end_of_turn> \(5\).*{base}.* with <eos> \(1\)"
    with pytest.raises(UserError, match=message):
        gkdjax.run(c, tmp_path / "run")
    # As it advises: the student's template is the teacher's.
    shutil.copy(pathlib.Path(other, template.name), template)
    assert models.resolve_models(config.parse(c), tmp_path / "run", None).chat.stop_ids == (5, 1)


def test_models_by_their_hub_ids(student, tmp_path, monkeypatch, capsys):
    root, commit = tmp_path / "hub" / "models--org--tiny", "c0ffee" + 34 * "0"
    shutil.copytree(student, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    run = tmp_path / "run"
    gkdjax.run(small("org/tiny", train__steps=2, train__export="both"), run)
    assert "org/tiny: a response ends with <end_of_turn> (5), <eos> (1)" in capsys.readouterr().out
    saved = json.loads((run / "adapter/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "org/tiny"
    load.load_pretrained(str(run / "merged"))

    # The run stays with what it began with when the repository moves on.
    assert json.loads((run / "models.json").read_text()) == {"org/tiny": commit}
    (root / "refs" / "main").write_text("f" * 40)
    export_step(run, tmp_path / "again")
    for file in ("model.safetensors", "tokenizer.json"):
        assert (run / "merged" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    for model in ("org/tiny", "org/absent"):
        with pytest.raises(UserError, match=model):
            gkdjax.run(small(model), tmp_path / "another")


def test_templates_see_the_day_on_which_the_run_began(student, tmp_path):
    """Or a run that is stopped and goes on the next day would find its rows changed."""
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(student, model)
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    run.mkdir()

    def prompt():
        chat = models.resolve_models(config.parse(small(str(model))), run, None).teacher_chat
        return chat.tokenizer.decode(chat.prompt_ids([Message("user", "so?")]))

    first, clock = prompt(), run / "clock.json"
    began = datetime.datetime.fromisoformat(json.loads(clock.read_text())["began"])
    assert began.strftime("%d %b %Y") in first
    clock.write_text('{"began": "2025-03-09T23:59:59"}')  # as if it had begun then
    assert prompt() == first.replace(began.strftime("%d %b %Y"), "09 Mar 2025")
    clock.unlink()
    (run / "rows.json").write_text("{}")  # a run of an older version sees the present time
    assert workdir.clock(run) is None and not clock.exists()
    assert datetime.datetime.now().strftime("%Y") in prompt()
