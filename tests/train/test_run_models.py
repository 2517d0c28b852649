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

import gkdjax
from gkdjax import config
from gkdjax.models import lora
from gkdjax.models.hf import export, load, model_config, peft
from gkdjax.tools.export_hf import export_step
from gkdjax.train import models, workdir
from gkdjax.types import Message
from gkdjax.utils.errors import UserError
from tests.small_runs import metrics, small

TARGETS = ("k_proj", "q_proj")


@pytest.fixture
def adapter(student, tmp_path):
    """adapter(base) -> a PEFT directory of rank 2 and alpha 3, on two of the base's kernels."""

    def write(base=student) -> str:
        decoder, _ = load.load_pretrained(base)
        made = builders.adapters(decoder, names=TARGETS)
        export.export_adapter(tmp_path / "adapter", decoder.spec, made, base)
        return str(tmp_path / "adapter")

    return write


def starting_from(student: str, directory: str, **changes):
    c = small(student, **changes)
    c.student.lora.init_from = directory
    c.student.lora.alpha = 3.0
    c.student.lora.targets = TARGETS
    return c


def test_a_run_goes_on_from_a_peft_adapter(student, adapter, tmp_path):
    c = starting_from(student, adapter(), train__steps=1, train__export="both")
    c.optim.learning_rate = 1e-9
    c.anchor.data, c.anchor.batch_size = [{"prompt": "other"}], 4
    gkdjax.run(c, tmp_path / "run")
    spec = model_config.load_spec(student)
    start, end = (
        peft.load_adapter(path, spec).adapters for path in (adapter(), tmp_path / "run/adapter")
    )
    assert start.keys() == end.keys()
    for path in start:
        np.testing.assert_allclose(end[path].b, start[path].b, atol=1e-7)
        assert end[path].scale == start[path].scale
    # The student as it was is the base with the adapter: the anchor finds no distance yet.
    assert metrics(tmp_path / "run")[0]["anchor_loss"] == pytest.approx(0.0, abs=1e-6)
    _, base = load.load_pretrained(student)
    _, merged = load.load_pretrained(str(tmp_path / "run/merged"))
    wanted = lora.merge(base, start)["layers"]["q_proj"]
    np.testing.assert_allclose(merged["layers"]["q_proj"], wanted, atol=1e-6)


def test_before_training_the_student_answers_with_its_starting_adapter(student, adapter, tmp_path):
    decoder, base = load.load_pretrained(student)
    start = adapter()
    merged = tmp_path / "merged_start"
    loaded = peft.load_adapter(start, decoder.spec).adapters
    export.export_merged(merged, decoder.spec, base, loaded, student)
    held_out = [{"prompt": "ask 1"}, {"prompt": "ask 7"}]
    found = []
    for name, c in {
        "adapter": starting_from(student, start, train__steps=1, eval__prompts=held_out),
        "merged": small(str(merged), train__steps=1, eval__prompts=held_out),
    }.items():
        c.teacher.backend, c.teacher.model = "flax", student
        results = gkdjax.run(c, tmp_path / name)
        found.append([results[who]["forward_kl"] for who in ("base", "prompted_base")])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert min(found[0]) > 1e-2  # the teacher is the base without the adapter


def test_a_config_that_tells_another_adapter_is_refused_with_what_to_set(
    student, adapter, tmp_path
):
    c = starting_from(student, adapter())
    c.student.lora.rank = 4
    with pytest.raises(UserError, match=r"rank=2, \.alpha=3\.0 and \.targets=\('k_proj', 'q_proj"):
        gkdjax.run(c, tmp_path / "run")


def test_an_adapter_of_several_ranks_cannot_be_gone_on_from(student, tmp_path):
    decoder, _ = load.load_pretrained(student)
    mixed = builders.adapters(decoder, names=["q_proj"]) | builders.adapters(
        decoder, names=["k_proj"], rank=3
    )
    export.export_adapter(tmp_path / "mixed", decoder.spec, mixed, student)
    with pytest.raises(UserError, match=r"several ranks or alphas \(rank_pattern"):
        gkdjax.run(starting_from(student, str(tmp_path / "mixed")), tmp_path / "run")


def test_an_adapter_of_another_base_is_refused(student, other, adapter, tmp_path):
    with pytest.raises(UserError, match="another base"):
        gkdjax.run(starting_from(student, adapter(other)), tmp_path / "run")


@pytest.mark.parametrize("key", ["student", "teacher"])
def test_an_adapter_given_as_a_model_is_named(student, adapter, tmp_path, key):
    c, directory = small(student, teacher__backend="flax", teacher__model=student), adapter()
    c[key].model = directory
    told = rf"{directory} is the directory of an adapter.*student\.lora\.init_from or teacher\.ada"
    with pytest.raises(UserError, match=told):
        gkdjax.run(c, tmp_path / "run")


def test_a_teacher_may_carry_an_adapter(student, other, adapter, tmp_path):
    decoder, base = load.load_pretrained(other)
    directory = adapter(other)
    loaded = peft.load_adapter(directory, decoder.spec).adapters
    merged = str(tmp_path / "merged_teacher")
    export.export_merged(merged, decoder.spec, base, loaded, other)
    losses = []
    for name, model, on_top in (
        ("carried", other, directory),
        ("merged", merged, ""),
        ("none", other, ""),
    ):
        c = small(student, train__steps=1, teacher__backend="flax", teacher__model=model)
        c.data.train = [{"prompt": "ask", "response": "told"}] * 4
        c.teacher.adapter = on_top
        gkdjax.run(c, tmp_path / name)
        losses.append(metrics(tmp_path / name)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0] - losses[2]) > 1e-2


def test_the_students_base_with_another_adapter_may_teach_without_a_prefix(
    student, adapter, tmp_path
):
    c = small(student, train__steps=1, context__prefix_messages=())
    c.teacher.adapter = adapter()
    gkdjax.run(c, tmp_path / "run")
    assert metrics(tmp_path / "run")[0]["loss"] > 1e-2


@pytest.mark.parametrize("teacher", [{"backend": "flax"}, {"backend": "vllm", "tokenizer": True}])
def test_the_tokenizer_of_a_directory_is_read_once(student, tmp_path, monkeypatch, teacher):
    """Student and teacher may name one directory; a large vocabulary takes seconds to read."""
    read, once = models.load_chat, []
    monkeypatch.setattr(models, "load_chat", lambda *how: once.append(how) or read(*how))
    c = small(student, teacher__model=student, teacher__backend=teacher["backend"])
    if "tokenizer" in teacher:
        c.teacher.tokenizer, c.teacher.model = student, ""
        c.teacher.api_base = "http://127.0.0.1:9/v1"
    found = models.resolve_models(config.parse(c), tmp_path, None)
    assert len(once) == 1 and found.chat.tokenizer is found.teacher_chat.tokenizer


def test_a_teacher_may_borrow_a_tokenizer(student, other, tmp_path):
    bare = shutil.copytree(other, tmp_path / "bare")
    for file in bare.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    c = small(student, train__steps=1, teacher__backend="flax", teacher__model=str(bare))
    with pytest.raises(UserError, match="bare"):
        gkdjax.run(c, tmp_path / "without")
    c.teacher.tokenizer = other
    gkdjax.run(c, tmp_path / "with")
    assert metrics(tmp_path / "with")[0]["loss"] > 0


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> tuple[str, str]:
    """Two teachers of the same weights: the student's tokenizer, and two added tokens beside it.

    The second has a row for each, and likes the first of them better than what the other one likes
    best, "<"; eight rows more are no token.
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
        kept = weights | {"model.embed_tokens.weight": table[:rows]}
        safetensors.numpy.save_file(kept, directory / "model.safetensors", {"format": "pt"})
        fields = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(fields | {"vocab_size": rows}))
    return str(plain), str(more)


@pytest.mark.slow(20)
def test_a_teacher_with_added_tokens_teaches_those_that_the_student_has(
    student, grown, tmp_path, caplog
):
    """Of a whole vocabulary what both have counts: the teacher without them says the same of it.

    The best K lose what only the teacher has, and with it most of their mass.
    """
    known = len(factories.tokenizer())
    found = {}
    for name, model, top_k in (("without", 0, None), ("dense", 1, None), ("top_k", 1, 3)):
        c = small(student, train__steps=2, gkd__on_policy_fraction=0.5)
        c.teacher.backend, c.teacher.model, c.teacher.top_k = "flax", grown[model], top_k
        if top_k is not None:
            c.eval.prompts = [{"prompt": "ask 7"}]
        caplog.clear()
        with caplog.at_level(logging.WARNING, "absl"):
            found[name] = gkdjax.run(c, tmp_path / name)
        said = [record.getMessage() for record in caplog.records]
        parted = [text for text in said if f"part at id {known}, '<think>' in the teach" in text]
        assert len(parted) == model  # once, where it is so
        for file in ("trajectories_train.jsonl", "trajectories_student.jsonl"):
            lines = (tmp_path / name / file).read_text().splitlines()
            assert max(max(json.loads(line)["ids"]) for line in lines) < known
    losses = {n: [line["loss"] for line in metrics(tmp_path / n)] for n in found}
    assert losses["dense"] == pytest.approx(losses["without"], rel=1e-5)
    # The teacher's best token is none of the student's: its mass is outside of the K.
    student_measures = found["top_k"]["student"]
    assert student_measures["top1_agreement"] == 0
    assert student_measures["teacher_top_k_mass"] < 0.3 and losses["top_k"][1] > 0


@pytest.mark.parametrize("backend", ["flax", "vllm"])
def test_a_teacher_that_ends_turns_where_the_student_runs_on_is_refused(
    student, other, tmp_path, backend
):
    base = shutil.copytree(student, tmp_path / "base")
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("<end_of_turn>", "<eos>"))
    (base / "generation_config.json").write_text('{"eos_token_id": 1}')
    c = small(str(base), teacher__backend=backend)
    key = "model" if backend == "flax" else "tokenizer"  # of the server's model
    c.teacher[key] = other
    if backend == "vllm":
        c.teacher.api_base = "http://127.0.0.1:9/v1"
    told = rf"\({other}\) ends a turn with <end_of_turn> \(5\).*{base}.* with <eos> \(1\)"
    with pytest.raises(UserError, match=told):
        gkdjax.run(c, tmp_path / "run")
    # As it advises: the student's template is the teacher's.
    shutil.copy(pathlib.Path(other, template.name), template)
    assert models.resolve_models(config.parse(c), tmp_path / "run", None).chat.stop_ids == (5, 1)


COMMIT = "c0ffee" + 34 * "0"


def test_models_by_their_hub_ids(student, tmp_path, monkeypatch, capsys):
    root = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(student, root / "snapshots" / COMMIT)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    gkdjax.run(small("org/tiny", train__steps=2, train__export="both"), tmp_path / "run")
    assert "org/tiny: a response ends with <end_of_turn> (5), <eos> (1)" in capsys.readouterr().out
    told = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "org/tiny"
    load.load_pretrained(str(tmp_path / "run/merged"))

    # The run stays with what it began with when the repository moves on.
    assert json.loads((tmp_path / "run/models.json").read_text()) == {"org/tiny": COMMIT}
    (root / "refs" / "main").write_text("f" * 40)
    export_step(tmp_path / "run", tmp_path / "again")
    for file in ("model.safetensors", "tokenizer.json"):
        first, second = (tmp_path / name / file for name in ("run/merged", "again"))
        assert first.read_bytes() == second.read_bytes()
    for model in ("org/tiny", "org/absent"):
        with pytest.raises(UserError, match=model):
            gkdjax.run(small(model), tmp_path / "another")


def test_templates_see_the_day_on_which_the_run_began(student, tmp_path):
    """Or a run that is stopped and goes on the next day would find its rows changed."""
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(student, model)
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    c = config.parse(small(str(model)))
    run.mkdir()

    def prompt():
        chat = models.resolve_models(c, run, None).teacher_chat
        return chat.tokenizer.decode(chat.prompt_ids([Message("user", "so?")]))

    first = prompt()
    clock = run / "clock.json"
    began = datetime.datetime.fromisoformat(json.loads(clock.read_text())["began"])
    assert began.strftime("%d %b %Y") in first
    clock.write_text('{"began": "2025-03-09T23:59:59"}')  # as if it had begun then
    assert prompt() == first.replace(began.strftime("%d %b %Y"), "09 Mar 2025")
    clock.unlink()
    (run / "rows.json").write_text("{}")  # a run of a time before: it sees the time
    assert workdir.clock(run) is None and not clock.exists()
    assert datetime.datetime.now().strftime("%Y") in prompt()
