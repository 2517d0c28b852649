"""Defaults, types and values of the config, without any file or model."""

import dataclasses

import numpy as np
import pytest
from ml_collections import config_dict

from gkdjax import config
from gkdjax.utils.errors import UserError


def valid() -> config_dict.ConfigDict:
    c = config.default()
    c.student.model = "models/student"
    c.data.train = [{"prompt": "a"}]
    return c


def changed(key: str, value) -> config_dict.ConfigDict:
    """A valid config with one value replaced, however wrong its type."""
    raw = valid().to_dict()
    section = raw
    *path, name = key.split(".")
    for part in path:
        section = section[part]
    section[name] = value
    return raw


def test_default_holds_every_key_and_parses_back_to_the_dataclasses():
    c = valid()
    parsed = config.parse(c)
    assert parsed == dataclasses.replace(
        config.Config(),
        student=config.Student(model="models/student"),
        data=config.Data(train=({"prompt": "a"},)),
    )
    assert set(c.to_dict()) == {field.name for field in dataclasses.fields(config.Config)}


def test_an_unset_model_or_data_is_asked_for():
    for key in ("student.model", "data.train"):
        with pytest.raises(UserError, match=key):
            config.parse(changed(key, ""))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("gkd.jsd_beta", 1.5, r"in \[0, 1\]"),
        ("gkd.on_policy_fraction", -0.1, r"in \[0, 1\]"),
        ("gkd.divergence", "foward_kl", "did you mean 'forward_kl'"),
        ("gkd.tail", "bin", "bucket, renormalize"),
        ("gkd.temperature", 0.0, "positive"),
        ("gkd.temperature", float("nan"), "finite"),
        ("teacher.backend", "hf", "called 'flax' here"),
        ("teacher.backend", "tgi", "local-toggle, flax, vllm, sglang, openai"),
        ("teacher.backend", "vllm", r"teacher\.api_base = '': name the server's address"),
        ("teacher.api_base", "http://h", "is for servers; set teacher.backend to one of vllm"),
        ("teacher.store", None, "is for servers"),
        ("teacher.offline", True, "is for servers"),
        ("teacher.backend", "flax", "teacher.model"),
        ("teacher.model", "elsewhere", "teacher.backend='flax'"),
        ("teacher.top_k", 0, "at least 1"),
        ("teacher.top_k", "many", "int or None"),
        ("student.lora.targets", "all", "all-linear"),
        ("student.lora.targets", [], "names no kernel"),
        ("student.lora.targets", ["q_proj", "[k"], "no regular expression"),
        ("student.lora.dropout", 1.0, r"\[0, 1\)"),
        ("context.prefix_messages", [{"role": "system"}], "content"),
        ("context.target_roles", [], "no role"),
        ("context.target_content_pattern", "(a", "no regular expression"),
        ("context.target_span", "match", "of what. Set context.target_content_pattern"),
        ("context.target_span", "mach", "did you mean 'match'"),
        ("context.student_retained_turns", -1, "at least 0"),
        ("data.too_long", "cut", "drop, truncate-right, truncate-left"),
        ("data.bad_rows", "skip", "refuse, drop"),
        ("rollout.top_p", 0.0, r"\(0, 1\]"),
        ("rollout.top_k", 0, "at least 1, or None"),
        ("rollout.refresh_every_steps", 0, "at least 1, or None"),
        ("gkd.on_policy_buffer_steps", 0, "at least 1"),
        ("gkd.on_policy_schedule", "linaer", "did you mean 'linear'"),
        ("optim.schedule", "cosin", "did you mean 'cosine'"),
        ("train.batch_size", 2.5, "must be int"),
        ("train.batch_size", True, "must be int"),
        ("train.steps", 10, "one as None"),
        ("train.grad_accum_steps", 3, "multiple of train.grad_accum_steps"),
        ("train.export", "all", "merged, adapter, both"),
        ("anchor.reference", "student", "base, teacher"),
        ("anchor.data", {"a/b": "a.jsonl"}, "letters, digits"),
        ("anchor.data", {}, "names no set"),
        ("anchor.weight", {"chat": 1.0}, "a single set, whose weight is a number"),
        ("gkd.reduction", "mean", "token, example"),
        ("checkpoint.max_to_keep", 0, "at least 1"),
        ("checkpoint.keep_evaluated", True, "set eval.every_steps or eval.at_steps"),
        ("eval.retention", ["x.jsonl"], "must be"),
        ("eval.retention", {"heldout": "x.jsonl"}, "the name of another set"),
        (
            "data.train",
            [{"prompt": "hi"}] * 3000 + ["hi"],
            r"train\[3000\] must be dict, not 'hi'$",
        ),
        (
            "data.train",
            [{"prompt": "a", "x": np.ones(3)}],
            r"train\[0\]\['x'\] is of the type ndar",
        ),
        ("data.train", [{"prompt": "a", "x": [np.int64(1)]}], r"\['x'\]\[0\] is of the type int64"),
        ("data.train", [{"prompt": "a", "x": float("nan")}], r"is nan, which is not JSON; .* None"),
        ("train.seed", "9" * 999, r"config\.train\.seed must be int, not '9{59}\.\.\. \(str\)$"),
        ("data.template_kwargs", {"tokenize": True}, "for the rendering and not for the template"),
        ("data.template_kwargs", {"add_generation_prompt": True}, "set by the run; leave it out"),
        ("eval.match", "keyword", "did you mean 'keywords'"),
        ("eval.every_steps", 0, "at least 1, or None"),
        ("eval.at_steps", [5, -1], "at least 0"),
        ("eval.at_steps", [5], "nothing to measure on"),
        ("eval.other_prefix", [{"role": "system"}], "each message is"),
        (
            "eval.other_prefix",
            [{"role": "a", "content": "b"}],
            "set eval.questions or eval.prompts",
        ),
        ("data.validation", 1.0, "a share of data.train is in"),
        ("data.validation", 0, "a share of data.train is in"),
        ("data.validation", "", "name a file or a dataset"),
        ("mesh.fsdp", 0, "a number of devices, or -1"),
        ("mesh.tensor", -1, r"mesh\.data is -1 as well"),
        ("mesh.teacher_rules", [{"leaves": ".*", "axes": []}], r"set mesh\.student_rules"),
        ("mesh.student_rules", [{"leaves": "("}], r"is \{'leaves'"),
        ("mesh.student_rules", [{"leaves": "(", "axes": []}], "no regular expression"),
        ("mesh.student_rules", [{"leaves": "a", "axes": ["fdsp"]}], "did you mean 'fsdp'"),
        ("mesh.student_rules", [{"leaves": "a", "axes": ["fsdp"] * 2}], "cuts one dimension"),
    ],
)
def test_a_bad_value_is_named_with_what_would_be_right(key, value, told):
    with pytest.raises(UserError, match=told) as caught:
        config.parse(changed(key, value))
    assert key.split(".")[0] in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("beta", "instead"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_generalized_jsd_at_an_end_names_the_divergence_to_use(beta, instead):
    raw = changed("gkd.divergence", "generalized_jsd")
    raw["gkd"]["jsd_beta"] = beta
    with pytest.raises(UserError, match=instead):
        config.parse(raw)


def test_full_fine_tuning_has_no_adapter_to_export():
    raw = changed("student.adapter", "none")
    raw["train"]["export"] = "both"
    with pytest.raises(UserError, match="only 'merged'"):
        config.parse(raw)


@pytest.mark.parametrize(
    ("path", "nearest"), [("train.sede", "train.seed"), ("gdk.jsd_beta", "config.gkd")]
)
def test_an_unknown_key_suggests_the_nearest(path, nearest):
    with pytest.raises(UserError, match=nearest):
        config.check_key(path)
    with pytest.raises(UserError, match=nearest):
        raw = valid().to_dict()
        section, name = path.split(".")
        raw[section] = {**raw.get(section, {}), name: 1}
        config.parse(raw)


def test_a_missing_key_is_an_error_and_not_a_default():
    raw = valid().to_dict()
    del raw["train"]["seed"]
    with pytest.raises(UserError, match=r"config\.train\.seed is missing"):
        config.parse(raw)


def test_an_integer_stands_for_a_float_and_a_list_for_a_tuple():
    raw = changed("optim.learning_rate", 1)
    raw["data"]["bucket_lengths"] = [16, 2048]
    parsed = config.parse(raw)
    assert type(parsed.optim.learning_rate) is float
    assert parsed.data.bucket_lengths == (16, 2048)


@pytest.mark.parametrize(
    ("context", "told"),
    [
        (
            {"prefix_file": "p.json", "corpus": "c.txt"},
            r"^config\.context\.corpus = 'c\.txt': context\.prefix_file is set as well",
        ),
        (
            {
                "prefix_messages": [{"role": "system", "content": "s"}],
                "system_prompt_file": "p.txt",
            },
            r"system_prompt_file = 'p\.txt': context\.prefix_messages is set as well",
        ),
        (
            {"corpus": "c.txt", "history_as_prefix": True},
            r"history_as_prefix = True: every row has the prefix of context\.corpus then",
        ),
        ({"corpus": "c.txt", "corpus_template": "Know {c}"}, r"'Know {c}': has no {corpus}, where"),
        ({"corpus_template": "Know {corpus}"}, r"corpus_template = .*: is for context\.corpus"),
        ({"history_as_prefix": 1}, r"history_as_prefix must be bool, not 1"),
        ({"prefix_file": None}, r"prefix_file must be str, not None"),
    ],
)
def test_a_run_has_one_global_prefix_at_most(context, told):
    raw = valid().to_dict()
    raw["context"] |= context
    with pytest.raises(UserError, match=told):
        config.parse(raw)


@pytest.mark.parametrize(
    "context",
    [
        {"prefix_file": "p.json"},
        {"system_prompt_file": "p.txt"},
        {"corpus": "c.txt"},
        {"corpus": "c.txt", "corpus_template": "Know {corpus}"},
        {"history_as_prefix": True},
    ],
)
def test_each_way_to_a_prefix_is_accepted_alone(context):
    raw = valid().to_dict()
    raw["context"] |= context
    parsed = config.parse(raw)
    assert dataclasses.asdict(parsed.context).items() >= context.items()


@pytest.mark.parametrize(("old", "new"), config.RENAMED.items())
def test_an_old_key_names_the_new_one(old, new):
    raw = config.from_saved({})
    section, (*sections, name) = raw, old.split(".")
    for one in sections:
        section = section[one]
    section[name] = 1
    told = f"^config.{old} is now called config.{new}$"
    with pytest.raises(UserError, match=told):
        config.parse(raw)
    with pytest.raises(UserError, match=told):
        config.check_key(old)


def server(**keys) -> dict:
    """A valid config with a teacher at a server; `keys` are of other sections as gkd__tail."""
    raw = changed("teacher.backend", "vllm")
    raw["teacher"]["api_base"] = "http://127.0.0.1:8000/v1"
    for key, value in keys.items():
        section, _, name = key.rpartition("__")
        raw[section or "teacher"][name] = value
    return raw


def test_a_server_gives_twenty_tokens_unless_asked_otherwise():
    assert config.parse(server()).teacher.top_k == 20
    assert config.parse(server(top_k=5)).teacher.top_k == 5
    assert config.parse(valid()).teacher.top_k is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "dir"}, r"teacher\.model = 'dir': is of a teacher in this process.*api_model"),
        ({"adapter": "dir"}, r"teacher\.adapter = 'dir'"),
        ({"dtype": "bfloat16"}, r"teacher\.dtype = 'bfloat16'.*the server has its own"),
        ({"offline": True, "gkd__on_policy_fraction": 0.5}, r"no store has what the student"),
        ({"offline": True, "store": None}, r"teacher\.store = None.*name its file"),
        ({"concurrency": 0}, r"teacher\.concurrency = 0: must be at least 1"),
        ({"max_retries": -1}, r"teacher\.max_retries = -1"),
        ({"timeout_s": 0.0}, r"teacher\.timeout_s = 0\.0: must be positive, in seconds"),
        ({"deadline_s": -1}, r"teacher\.deadline_s"),
        ({"gkd__temperature": 2.0}, r"gkd\.temperature = 2\.0.*gkd\.tail to 'renormalize'"),
        ({"backend": "sglang"}, r"rollout\.temperature = 0\.8: an SGLang server has to draw at"),
    ],
)
def test_what_a_server_cannot_do_is_refused_before_it_is_asked(keys, message):
    with pytest.raises(UserError, match=message):
        config.parse(server(**keys))


def test_what_a_server_can_do_parses():
    for keys in (
        {"gkd__temperature": 2.0, "gkd__tail": "renormalize"},
        {"offline": True, "api_base": ""},
        {"backend": "sglang", "rollout__temperature": 1.0},
        {"backend": "openai", "api_key_env": "TEACHER_KEY_2", "tokenizer": "dir"},
    ):
        config.parse(server(**keys))


def test_a_secret_in_the_address_is_not_repeated():
    for address in ("https://me:sk-4f1d@host/v1", "https://host/v1?key=sk-4f1d"):
        with pytest.raises(UserError, match="without a user, a password or a query") as caught:
            config.parse(server(api_base=address))
        assert "sk-4f1d" not in str(caught.value)


def test_a_key_in_place_of_its_name_is_not_repeated():
    for key in ("sk-4f1dc0ffee", "TEACHER KEY", "4KEY"):
        with pytest.raises(UserError, match="never the key itself") as caught:
            config.parse(server(api_key_env=key))
        assert key not in str(caught.value)


def test_an_anchors_rows_are_divided_only_where_there_is_an_anchor():
    c = config.default()
    c.student.model, c.data.train = "m", "a.jsonl"
    c.train.batch_size = c.train.grad_accum_steps = 16
    assert config.rows_at_once(config.parse(c)) == {"train.batch_size": 1, "eval.batch_size": 64}
    c.anchor.data = "b.jsonl"
    with pytest.raises(UserError, match=r"anchor\.batch_size = 8: must be a multiple of"):
        config.parse(c)
