"""configs/README.md: every config, commands that parse; the tables of who comes from elsewhere."""

import pathlib
import re
import runpy

import pytest

from gkdjax import config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
INDEX = (CONFIGS / "README.md").read_text()
COMING_FROM = (CONFIGS.parent / "gkdjax" / "config" / "coming_from.md").read_text()
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
SECTIONS = "|".join(config.default())
KEY = re.compile(rf"`((?:{SECTIONS})\.(?!jsonl)[a-z_.]+)`")
OF_TRL, _, OF_BAKERY = COMING_FROM.partition("## Coming from bakery")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows(text: str) -> list[list[str]]:
    return [cells(line) for line in text.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_is_listed_with_a_command_for_each_of_its_modes(path):
    modes = [mode for name, mode in COMMAND.findall(INDEX) if name == path.stem]
    has_tiny = f"{path.name}:tiny" in runpy.run_path(str(path))["__doc__"]
    assert modes == (["", "tiny"] if has_tiny else [""])
    assert f"| `{path.name}` |" in INDEX


@pytest.mark.parametrize(("name", "mode"), COMMAND.findall(INDEX))
def test_each_command_parses(name, mode, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # tiny modes make their models here
    get_config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]
    config.parse(get_config(mode) if mode else get_config())


def test_all_of_bakerys_options_are_there_once():
    named = [row[0].strip("`") for row in rows(OF_BAKERY)]
    assert sorted(named) == sorted(BAKERY)


def test_all_of_our_names_are_keys_of_the_config():
    keys = KEY.findall(INDEX + COMING_FROM)
    assert len(set(keys)) > 45
    for key in keys:
        config.check_key(key)


def test_each_row_names_a_key_or_says_why_there_is_none():
    for bakery, ours, differs in rows(OF_BAKERY):
        assert KEY.fullmatch(ours) or ours == "`--workdir`" or (ours == "none" and differs), bakery


def test_each_row_of_trl_names_keys_and_whose_option_it_is():
    assert len(rows(OF_TRL)) > 20
    for trl, ours, of, differs in rows(OF_TRL):
        assert KEY.findall(ours) or (ours == "none" and differs), trl
        assert of, trl
