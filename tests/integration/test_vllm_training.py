"""Whole runs with a real vLLM for a teacher, beside the same runs with it in this process."""

import concurrent.futures
import json
import shutil
import time
import urllib.request

import factories
import jax
import numpy as np
import pytest
from small_runs import metrics, small
from vllm_server import connected

import gkdjax
from gkdjax.config import ASSETS, Lora, parse
from gkdjax.data.chat_template import load_chat
from gkdjax.models import lora
from gkdjax.models.hf import export, load
from gkdjax.types import Prompt, SamplingParams

pytestmark = pytest.mark.integration
NATS = 1e-4  # a loss here and there
ASKED = [{"role": "user", "content": "sort: fbdac"}]


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    """Another model than the teacher, of heads that vLLM can serve."""
    where = tmp_path_factory.mktemp("student")
    return factories.model_dir(where, seed=9, head_dim=32, hidden_size=32)


def config(student, **changes):
    """Rows with and without a response, a prefix, on-policy, an anchor towards the teacher."""
    c = small(student)
    c.teacher.top_k = 20
    c.rollout.temperature = 0.0  # text does not hang on who draws
    c.rollout.max_new_tokens = 8
    c.gkd.on_policy_fraction, c.gkd.divergence, c.gkd.jsd_beta = 0.5, "generalized_jsd", 0.5
    c.data.train = [{"prompt": f"ask {i}"} for i in range(6)]
    c.data.train += [{"prompt": f"say {i}", "response": "so be it"} for i in range(2)]
    c.anchor.data, c.anchor.reference = [{"prompt": f"other {i}"} for i in range(4)], "teacher"
    c.anchor.batch_size = 4
    c.eval.prompts = [{"prompt": f"why {i}"} for i in range(4)]
    c.train.steps, c.train.export = 8, "both"
    for key, value in changes.items():
        section, _, name = key.partition("__")
        c[section][name] = value
    return c


def at_server(student, server, **changes):
    """The same config with a server."""
    return config(student, teacher__backend="vllm", teacher__api_base=server.base, **changes)


@pytest.fixture(scope="module")
def local(student, model, tmp_path_factory):
    """(results, directory) of the run with its teacher in this process."""
    workdir = tmp_path_factory.mktemp("local")
    c = config(student, teacher__backend="flax", teacher__model=model("gemma3"))
    return gkdjax.run(c, workdir), workdir


def assert_alike(workdir, local) -> None:
    """The same batches, and the same losses but for rounding."""
    _, beside = local
    ours, theirs = metrics(workdir), metrics(beside)
    assert [line["batch_crc32"] for line in ours] == [line["batch_crc32"] for line in theirs]
    assert 0 < sum(line["on_policy_rows"] for line in ours) < 4 * len(ours)
    for name in ("loss", "anchor_loss"):
        values = [[line[name] for line in lines] for lines in (ours, theirs)]
        np.testing.assert_allclose(*values, atol=NATS)


def test_the_losses_are_those_of_the_same_teacher_in_process(student, gemma, local, tmp_path):
    results = gkdjax.run(at_server(student, gemma), tmp_path)
    assert_alike(tmp_path, local)
    assert results["teacher"]["retries"] == 0 and results["teacher"]["bought"] > 0
    for when in ("before", "after"):
        found = results["held_out"][when], local[0]["held_out"][when]
        for name in ("teacher_text/forward_kl", "student_text/reverse_kl"):
            np.testing.assert_allclose(*[values[name] for values in found], atol=NATS)


def kill_and_start_again(server, steps) -> None:
    """Kills it when the file has three steps."""
    deadline = time.monotonic() + 300.0
    while not steps.exists() or steps.read_text().count("\n") < 3:
        assert time.monotonic() < deadline, "the run does not come on"
        time.sleep(0.01)
    server.kill()
    server.start()


def test_a_server_that_is_killed_and_comes_back(student, gemma, local, tmp_path):
    c = at_server(student, gemma, teacher__deadline_s=300.0)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        killing = threads.submit(kill_and_start_again, gemma, tmp_path / "metrics.jsonl")
        results = gkdjax.run(c, tmp_path)
        killing.result()
    assert results["teacher"]["retries"] > 0
    assert_alike(tmp_path, local)


def texts_of(c, workdir, adapter="") -> tuple[list, list]:
    """Greedy ids, of four prompts: (the server's, those of our own sampler)."""
    with connected(parse(c), workdir, adapter) as (rows, local):
        prompts = [
            Prompt(example.name, rows.rules.prompts(example)[0], ())
            for example in rows.examples.train
        ]
        greedy = SamplingParams(24, temperature=0.0, top_p=1.0)
        return tuple(
            [completion.ids.tolist() for completion in teacher.sample(prompts, [0] * 4, greedy)]
            for teacher in (rows.teacher, local)
        )


def exported(model, server, name):
    """A config to ask the server for the text of what a run has exported."""
    c = small(str(model), teacher__backend="vllm", teacher__api_base=server.base)
    c.teacher.api_model, c.teacher.store = name, None
    c.data.train = [{"prompt": f"ask {i}"} for i in range(4)]
    return c


def test_the_exported_model_says_at_vllm_what_it_says_here(serve, local, tmp_path):
    merged = local[1] / "merged"
    with serve(merged, "merged") as server:
        theirs, ours = texts_of(exported(merged, server, "merged"), tmp_path)
    assert theirs == ours


def test_the_exported_adapter_says_at_vllm_what_it_says_here(serve, student, local, tmp_path):
    adapter = local[1] / "adapter"
    with serve(student, "base", "--enable-lora", "--lora-modules", f"baked={adapter}") as server:
        c = exported(student, server, "baked")
        baked, ours = texts_of(c, tmp_path / "baked", str(adapter))
        base, _ = texts_of(exported(student, server, "base"), tmp_path / "base")
    assert baked == ours and baked != base


def served_text(server, name) -> tuple[str, str]:
    """(what it writes in a chat, told nothing of where to stop, why it stopped)."""
    asked = {"model": name, "messages": ASKED, "temperature": 0.0, "max_tokens": 40}
    request = urllib.request.Request(
        f"{server.base}/chat/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300.0) as reply:
        (choice,) = json.load(reply)["choices"]
    return choice["message"]["content"], choice["finish_reason"]


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_a_served_export_stops_on_its_own(serve, tmp_path, kind):
    """The student's generation_config.json does not have its template's end of turn."""
    base = shutil.copytree(ASSETS / "quickstart" / "student", tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 1}')
    chat, (decoder, params) = load_chat(base), load.load_pretrained(base)
    ending, none_yet = export.Ending(chat.stop_ids, chat.pad_id), Lora(4, 8.0)
    adapters = lora.init(jax.random.key(0), params, none_yet)
    out = tmp_path / kind
    if kind == "merged":
        export.export_merged(out, decoder.spec, params, None, base, ending=ending)
        served = serve(out, "baked")
    else:  # as the README has it
        export.export_adapter(out, decoder.spec, adapters, base, ending=ending)
        lora_flags = ("--enable-lora", "--lora-modules", f"baked={out}")
        served = serve(base, "base", *lora_flags, "--generation-config", str(out))
    with served as server:
        assert served_text(server, "baked") == ("abcdf", "stop")
