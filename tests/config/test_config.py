"""Defaults, types and values of the config, without any file or model."""

import dataclasses
import typing

import numpy as np
import pytest
from ml_collections import config_dict

from gkdjax import config
from gkdjax.config import schema
from gkdjax.losses.divergences import DIVERGENCES
from gkdjax.utils.errors import UserError


def valid() -> config_dict.ConfigDict:
    c = config.default()
    c.student.model = "models/student"
    c.data.train = [{"prompt": "a"}]
    return c


def changed(changes: dict) -> dict:
    """A valid config with other values by key, however wrong their types."""
    raw = valid().to_dict()
    for key, value in changes.items():
        section, (*path, name) = raw, key.split(".")
        for part in path:
            section = section[part]
        section[name] = value
    return raw


def server(**keys) -> dict:
    """A valid config with a teacher at a server, and these keys of `teacher`."""
    keys = {"backend": "vllm", "api_base": "http://127.0.0.1:8000/v1"} | keys
    return {f"teacher.{key}": value for key, value in keys.items()}


def test_default_holds_every_key_and_parses_back_to_the_dataclasses():
    c = valid()
    assert config.parse(c) == dataclasses.replace(
        config.Config(),
        student=config.Student(model="models/student"),
        data=config.Data(train=({"prompt": "a"},)),
    )
    assert set(c.to_dict()) == {field.name for field in dataclasses.fields(config.Config)}


def test_the_choices_are_those_of_the_losses():
    assert typing.get_args(schema.Divergence) == tuple(DIVERGENCES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.model": ""}, r"student\.model = '': name a Hugging Face directory"),
        ({"data.train": ""}, r"data\.train = '': name a file"),
        ({"gkd.jsd_beta": 1.5}, r"gkd\.jsd_beta = 1\.5: must be in \[0, 1\]"),
        ({"gkd.on_policy_fraction": -0.1}, r"must be in \[0, 1\]"),
        ({"gkd.divergence": "foward_kl"}, "did you mean 'forward_kl'"),
        ({"gkd.divergence": 3}, "gkd.divergence = 3: choose one of forward_kl"),
        ({"gkd.tail": "bin"}, "choose one of bucket, renormalize"),
        ({"gkd.temperature": 0.0}, r"gkd\.temperature = 0\.0: must be above 0"),
        ({"gkd.temperature": float("nan")}, "finite"),
        ({"gkd.temperature": 1e-320}, r"temperature = 1e-320: .* between 1e-37 and 3e\+38"),
        ({"gkd.temperature": 10**400}, r"temperature = 10{59}\.\.\. \(int\): .* and 3e\+38"),
        ({"train.epochs": 10**400}, r"epochs must be float above 0 or None, not 10{59}\.\.\."),
        ({"train.batch_size": 2**63}, r"batch_size = \d+: .* and 9e\+15"),
        (
            {"rollout.max_new_tokens": 2**31},
            r"max_new_tokens = 2147483648: must be in \[1, 1048576",
        ),
        ({"rollout.per_prompt": 2**31}, r"per_prompt = 2147483648: must be in \[1, 10000\]"),
        ({"teacher.backend": "hf"}, "called 'flax' here"),
        ({"teacher.backend": "tgi"}, "local-toggle, flax, vllm, sglang, openai"),
        ({"teacher.backend": "vllm"}, r"teacher\.api_base = '': name the server's address"),
        ({"teacher.api_base": "http://h"}, "is for servers; set teacher.backend to one of vllm"),
        ({"teacher.store": None}, "is for servers"),
        ({"teacher.offline": True}, "is for servers"),
        ({"teacher.backend": "flax"}, r"teacher\.model = '': the flax teacher needs a directory"),
        ({"teacher.model": "elsewhere"}, "teacher.backend='flax'"),
        ({"teacher.tokenizer": "elsewhere"}, "teacher.backend='flax'"),
        ({"teacher.dtype": "float8"}, "teacher.dtype = 'float8': did you mean"),
        ({"teacher.top_k": 0}, r"teacher\.top_k must be int at least 1 or None, not 0$"),
        ({"teacher.top_k": "many"}, "int at least 1 or None, not 'many'"),
        ({"student.lora.targets": "all"}, "all-linear"),
        ({"student.lora.targets": []}, "names no kernel"),
        ({"student.lora.targets": ["q_proj", "[k"]}, "no regular expression"),
        ({"student.lora.dropout": 1.0}, r"in \[0, 1\)"),
        ({"student.adapter": "none", "train.export": "both"}, "only 'merged'"),
        ({"student.adapter": "none", "student.lora.init_from": "dir"}, "there is no adapter"),
        ({"context.prefix_messages": [{"role": "system"}]}, r"prefix_messages\[0\] must be .*cont"),
        ({"context.prefix_messages": [{"role": "a", "content": 1}]}, r"\[0\]\.content must be str"),
        ({"context.target_roles": []}, "no role"),
        ({"context.target_roles": ["user"], "gkd.on_policy_fraction": 1.0}, "to have 'assistant'"),
        ({"context.target_content_pattern": "(a"}, "no regular expression"),
        ({"context.target_span": "match"}, "of what. Set context.target_content_pattern"),
        ({"context.target_span": "mach"}, "did you mean 'match'"),
        ({"context.student_retained_turns": -1}, "at least 0"),
        ({"context.prefix_file": "p", "context.corpus": "c"}, "context.prefix_file is set as well"),
        (
            {"context.corpus": "c.txt", "context.history_as_prefix": True},
            r"history_as_prefix = True: every row has the prefix of context\.corpus then",
        ),
        ({"context.corpus_template": "Know {c}"}, r"'Know {c}': has no {corpus}, where"),
        ({"context.corpus_template": "Know {corpus}"}, r"_template = .*: is for context\.corpus"),
        ({"context.history_as_prefix": 1}, r"history_as_prefix must be bool, not 1"),
        ({"context.prefix_file": None}, r"prefix_file must be str, not None"),
        ({"data.too_long": "cut"}, "drop, truncate-right, truncate-left"),
        ({"data.bucket_lengths": [8, 0]}, r"bucket_lengths\[1\] = 0: must be at least 1"),
        ({"data.validation": 1.0}, r"validation must be float in \(0, 1\) or str .*, not 1.0"),
        ({"data.validation": 0}, r"validation must be float in \(0, 1\) or str"),
        ({"data.validation": ""}, "name a file or a dataset"),
        ({"data.template_kwargs": {"tokenize": True}}, "for the rendering and not for the templ"),
        ({"data.train": [{"p": "hi"}] * 3000 + ["hi"]}, r"train\[3000\] must be dict, not 'hi'$"),
        ({"data.train": [{"x": np.ones(3)}]}, r"train\[0\]\['x'\] is of the type ndar"),
        ({"data.train": [{"x": [np.int64(1)]}]}, r"\['x'\]\[0\] is of the type int64"),
        ({"data.train": [{"x": float("nan")}]}, r"is nan, which is not JSON; .* None"),
        ({"rollout.top_p": 0.0}, r"\(0, 1\]"),
        ({"optim.schedule": "cosin"}, "did you mean 'cosine'"),
        ({"train.batch_size": 2.5}, "must be int"),
        ({"train.batch_size": True}, "must be int"),
        ({"train.seed": "9" * 999}, r"config\.train\.seed must be int, not '9{59}\.\.\. \(str\)$"),
        ({"train.seed": 2**32}, r"train\.seed = 4294967296: must be in \[0, 4294967295\]"),
        ({"train.steps": 10}, "one as None"),
        ({"train.grad_accum_steps": 3}, "multiple of train.grad_accum_steps"),
        ({"anchor.data": {"a/b": "a.jsonl"}}, "letters, digits"),
        ({"anchor.data": {}}, "names no set"),
        ({"anchor.weight": {"chat": 1.0}}, "a single set, whose weight is a number"),
        ({"anchor.data": {"a": "x"}, "anchor.weight": {"b": 1}}, "a weight for each set of .*, a"),
        ({"anchor.data": {"a": "x"}, "anchor.weight": {"a": 0}}, r"weight\.a = 0.0: must be above"),
        ({"checkpoint.keep_evaluated": True}, "set eval.every_steps or eval.at_steps"),
        ({"eval.retention": ["x.jsonl"]}, "must be"),
        ({"eval.retention": {"heldout": "x.jsonl"}}, "the name of another set"),
        ({"eval.at_steps": [5, -1]}, "at least 0"),
        ({"eval.at_steps": [5]}, "nothing to measure on"),
        ({"eval.every_steps": 5}, "nothing to measure on"),
        ({"eval.other_prefix": [{"role": "a", "content": "b"}]}, "set eval.questions or eval.pro"),
        ({"mesh.fsdp": 0}, "a number of devices, or -1"),
        ({"mesh.tensor": -1}, r"mesh\.data is -1 as well"),
        ({"mesh.teacher_rules": [{"leaves": ".*", "axes": []}]}, r"set mesh\.student_rules"),
        ({"mesh.student_rules": [{"leaves": "("}]}, r"must be a dict of leaves, axes"),
        ({"mesh.student_rules": [{"leaves": "(", "axes": []}]}, "no regular expression"),
        ({"mesh.student_rules": [{"leaves": "a", "axes": ["fdsp"]}]}, "did you mean 'fsdp'"),
        ({"mesh.student_rules": [{"leaves": "a", "axes": ["fsdp"] * 2}]}, "shards one dimension"),
        (server(model="dir"), r"model = 'dir': is of a teacher in this process.*api_model"),
        (server(adapter="dir"), r"teacher\.adapter = 'dir'"),
        (server(dtype="bfloat16"), r"teacher\.dtype = 'bfloat16'.*the server has its own$"),
        (server(offline=True) | {"gkd.on_policy_fraction": 0.5}, "no store has what the student"),
        (server(offline=True, store=None), r"teacher\.store = None.*name its file"),
        (server(concurrency=0), r"teacher\.concurrency = 0: must be at least 1"),
        (server(deadline_s=-1), r"teacher\.deadline_s = -1\.0: must be above 0"),
        (server() | {"gkd.temperature": 2.0}, r"gkd\.temperature = 2\.0.*tail to 'renormalize'"),
        (server(backend="sglang"), r"rollout\.temperature = 0\.8: an SGLang server has to sample"),
        ({"gkd.divergence": "generalized_jsd", "gkd.jsd_beta": 0}, "use 'forward_kl', its limit"),
        (
            {"anchor.data": "x", "anchor.divergence": "generalized_jsd", "gkd.jsd_beta": 1},
            "use 'reverse_kl', its limit",
        ),
        (
            {"anchor.data": "x", "train.batch_size": 16, "train.grad_accum_steps": 16},
            r"anchor\.batch_size = 8: must be a multiple of",
        ),
    ],
)
def test_a_bad_value_is_named_with_what_would_be_right(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        config.parse(changed(changes))
    assert str(caught.value).startswith("config.") and caught.value.exit_code == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"context.prefix_file": "p.json"},
        {"context.system_prompt_file": "p.txt"},
        {"context.corpus": "c.txt"},
        {"context.corpus": "c.txt", "context.corpus_template": "Know {corpus}"},
        {"context.history_as_prefix": True},
        {"context.prefix_messages": ({"role": "system", "content": "s"},)},
        {"mesh.student_rules": ({"leaves": "a", "axes": ("fsdp", None)},)},
        server() | {"gkd.temperature": 2.0, "gkd.tail": "renormalize"},
        server(offline=True, api_base=""),
        server(backend="sglang") | {"rollout.temperature": 1.0},
        server(backend="openai", api_key_env="TEACHER_KEY_2", tokenizer="dir"),
        {"optim.learning_rate": 1, "data.bucket_lengths": [16, 2048], "data.validation": 0.1},
    ],
)
def test_what_can_be_meant_is_accepted(changes):
    parsed = config.parse(changed(changes))
    for key, value in changes.items():
        section, name = key.split(".")
        found = getattr(getattr(parsed, section), name)
        assert found == (tuple(value) if isinstance(value, list) else value)
    assert type(parsed.optim.learning_rate) is float


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("train.sede", r"unknown key config\.train\.sede: did you mean config\.train\.seed\?"),
        ("gdk.jsd_beta", r"did you mean config\.gkd\?"),
        ("student.lora.xyz", r"config\.student\.lora\.xyz: there are \['alpha'"),
        *(
            (old, f"config.{old} is now called config.{new}$")
            for old, new in config.RENAMED.items()
        ),
    ],
)
def test_an_unknown_or_old_key_names_the_right_one(path, message):
    with pytest.raises(UserError, match=message):
        config.check_key(path)
    section = raw = valid().to_dict()
    *sections, name = path.split(".")
    for one in sections:
        section = section.setdefault(one, {})
    section[name] = 1
    with pytest.raises(UserError, match=message):
        config.parse(raw)


def test_a_missing_key_is_an_error_and_not_a_default():
    raw = valid().to_dict()
    del raw["train"]["seed"]
    with pytest.raises(UserError, match=r"config\.train\.seed is missing"):
        config.parse(raw)
    with pytest.raises(UserError, match=r"config\.train\.seed is one value"):
        config.check_key("train.seed.first")


def test_a_server_gives_twenty_tokens_unless_asked_otherwise():
    assert config.parse(changed(server())).teacher.top_k == 20
    assert config.parse(changed(server(top_k=5))).teacher.top_k == 5
    assert config.parse(valid()).teacher.top_k is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"api_base": "https://me:sk-4f1d@host/v1"}, "without a user, a password or a query"),
        ({"api_base": "https://host/v1?key=sk-4f1d"}, "without a user, a password or a query"),
        ({"api_base": "https://host/v1#sk-4f1d"}, "without a user, a password or a query"),
        ({"api_key_env": "sk-4f1dc0ffee"}, "never the key itself"),
        ({"api_key_env": "SK-4f1d KEY"}, "never the key itself"),
        ({"api_key_env": "4f1d"}, "never the key itself"),
    ],
)
def test_a_secret_is_not_repeated(keys, message):
    with pytest.raises(UserError, match=message) as caught:
        config.parse(changed(server(**keys)))
    assert "4f1d" not in str(caught.value)


def test_an_anchors_rows_are_divided_only_where_there_is_an_anchor():
    parts = {"train.batch_size": 16, "train.grad_accum_steps": 16}
    rows = config.rows_at_once(config.parse(changed(parts)))
    assert rows == {"train.batch_size": 1, "eval.batch_size": 64}
    rows = config.rows_at_once(config.parse(changed({"anchor.data": "b", "anchor.batch_size": 4})))
    assert rows["anchor.batch_size"] == 4
