"""Every config parses in every mode; configs/README.md and coming_from.md name real keys."""

import copy
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
from check_quickstart import shortfalls

from gkdjax import config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))
WITH_TINY = [name for name in NAMES if name != "quickstart"]
SERVERS = ("openai_teacher", "vllm_teacher")  # their tiny modes make no models
V5E_CHIPS = 8
INDEX = (CONFIGS / "README.md").read_text()
COMING_FROM = (CONFIGS.parent / "gkdjax" / "config" / "coming_from.md").read_text()
OF_TRL, _, OF_BAKERY = COMING_FROM.partition("## Coming from bakery")
BAKERY = re.findall(
    r"\w+",
    """
system_prompt system_prompt_file num_trajectories trajectory_length temperature sampling_temperature
max_seq_length sequential_eval model_name_or_path torch_dtype trust_remote_code load_in_4bit
bnb_4bit_quant_type bnb_4bit_use_double_quant attn_implementation auto_install_optional_deps
use_unsloth dataset dataset_split training_prompts eval_dataset_split eval_file heldout_file
corpus_file corpus_format system_prompt_template r lora_alpha target_modules lora_dropout bias
prefix_messages prefix_messages_file student_retained_turns target_roles target_content_pattern
teacher_backend teacher_model_name_or_path teacher_torch_dtype teacher_top_k teacher_api_base
teacher_api_model gkd_on_policy_fraction gkd_jsd_beta
output_dir num_train_epochs learning_rate per_device_train_batch_size gradient_accumulation_steps
max_grad_norm logging_steps save_strategy eval_strategy eval_steps gradient_checkpointing optim bf16
report_to seed lr_scheduler_type warmup_ratio
""",
)
COMMAND = re.compile(r"`python -m gkdjax\.main --config=configs/(\w+)\.py(?::(\w+))?`")
KEY = re.compile(rf"`((?:{'|'.join(config.default())})\.(?!jsonl)[a-z_.]+)`")


def load(name: str) -> dict:
    return runpy.run_path(str(CONFIGS / f"{name}.py"))


@pytest.mark.parametrize("name", NAMES)
def test_every_config_parses_and_is_listed_with_a_command_for_each_mode(
    name, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)  # a config must not depend on where it is run
    module = load(name)
    config.parse(module["get_config"]())
    modes = ["", "tiny"] if name in WITH_TINY else [""]
    assert [mode for found, mode in COMMAND.findall(INDEX) if found == name] == modes
    assert f"| `{name}.py` |" in INDEX
    for mode in modes:
        suffix = f":{mode}" if mode else ""
        assert f"python -m gkdjax.main --config=configs/{name}.py{suffix}" in module["__doc__"]
    if name in WITH_TINY:
        assert "this mode has not been run yet" in " ".join(module["__doc__"].split())
        assert "on 2 CPU cores" in " ".join(module["__doc__"].split())
        wanted = rf"mode 'tny'.*configs/{name}\.py:tiny"
        with pytest.raises(ValueError, match=wanted):
            module["get_config"]("tny")
    assert list(tmp_path.iterdir()) == []  # the full modes make no model


def test_tiny_modes_parse_before_jax_is_loaded(tmp_path):
    """`gkdjax.main` counts the devices out after it has read the config; so a new process."""
    code = "import runpy, sys\nfrom gkdjax import config\nfor path in sys.argv[1:]:\n"
    code += "    config.parse(runpy.run_path(path)['get_config']('tiny'))\n"
    code += "    assert 'jax' not in sys.modules, path"
    paths = [str(CONFIGS / f"{name}.py") for name in WITH_TINY]
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
    command = [sys.executable, "-c", code, *paths]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    made = sorted(path.name for path in (tmp_path / "runs/tiny_models").iterdir())
    large = ["student-262144", "student-512", "teacher-262144"]
    assert made == ["corpus_knowledge-documents.jsonl", *large]


def test_the_full_mode_of_gemma3_fills_the_chips_that_it_is_made_for():
    parsed = config.parse(load("gemma3")["get_config"]())
    models = (parsed.teacher.model, parsed.student.model)
    assert models == ("google/gemma-3-1b-it", "google/gemma-3-270m-it")
    for key, rows in config.rows_at_once(parsed).items():
        assert rows % V5E_CHIPS == 0, key
    (message,) = parsed.context.prefix_messages
    assert message["role"] == "system" and "Check:" in message["content"]


@pytest.mark.parametrize("mode", ["", "tiny"])
def test_only_the_vllm_teacher_learns_on_policy(mode, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    openai, vllm = (config.parse(load(name)["get_config"](mode)) for name in SERVERS)
    assert (vllm.teacher.backend, vllm.teacher.top_k) == ("vllm", 20)
    assert vllm.gkd.on_policy_fraction > 0 and vllm.context.prefix_messages
    assert openai.teacher.backend == "openai" and openai.gkd.on_policy_fraction == 0
    assert openai.anchor.reference == "base"
    assert bool(openai.teacher.api_key_env) == (mode == "")
    assert list(tmp_path.iterdir()) == []


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_tables_of_users_of_trl_and_bakery():
    assert sorted(row[0].strip("`") for row in rows(OF_BAKERY)) == sorted(BAKERY)
    for bakery, ours, differs in rows(OF_BAKERY):
        assert KEY.fullmatch(ours) or ours == "`--workdir`" or (ours == "none" and differs), bakery
    assert len(rows(OF_TRL)) > 20
    for trl, ours, of, differs in rows(OF_TRL):
        assert of and (KEY.findall(ours) or (ours == "none" and differs)), trl
    keys = KEY.findall(INDEX + COMING_FROM)
    assert len(set(keys)) > 45
    for key in keys:
        config.check_key(key)


GOOD = {
    "base": {"accuracy": 0.0, "forward_kl": 5.0},
    "student": {"accuracy": 0.99, "forward_kl": 0.01},
    "recovery": 0.99,
    "retention": {
        "sort": {"before": 0.99, "after": 0.97},
        "other keys": {"before": 0.8, "after": 0.9},
    },
}


def test_the_quickstarts_aim_is_met_by_good_results_alone():
    assert shortfalls(GOOD) == []
    for spoil in (
        lambda r: r.update(recovery=0.97),
        lambda r: r["base"].update(accuracy=0.5),
        lambda r: r["student"].update(forward_kl=2.0),
        lambda r: r["retention"]["sort"].update(after=0.96),
        lambda r: r["retention"]["other keys"].update(after=0.7),
    ):
        spoilt = copy.deepcopy(GOOD)
        spoil(spoilt)
        assert len(shortfalls(spoilt)) == 1
