"""The commands of launch/README.md are ones that the scripts take."""

import re
import runpy
import shlex

import pytest
from launch.test_scripts import TPU, call
from launch.together import LAUNCH, ROOT

from gkdjax import config, main

TEXT = (LAUNCH / "README.md").read_text()
COMMANDS = [
    shlex.split(block.replace("\\\n", " "))
    for block in re.findall(r"^    +((?:[^\n]*\\\n)*[^\n]*)$", TEXT, re.MULTILINE)
]


def test_every_script_is_named_and_every_named_file_is_there():
    named = set(re.findall(r"launch/([\w.]+\.(?:sh|yaml|sbatch))", TEXT))
    named |= set(re.findall(r"`([\w.]+\.(?:sh|yaml|sbatch|txt))", TEXT))
    assert len(named) >= 10
    assert all((LAUNCH / name).is_file() for name in named), named
    there = {f.name for f in LAUNCH.iterdir() if f.suffix in (".sh", ".sbatch", ".yaml")}
    inner = {"worker_run.sh", "worker_setup.sh"}  # tpu_vm.sh calls them
    assert all(name in TEXT for name in there - inner)


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if c[0].startswith("launch/tpu_")],
    ids=lambda command: " ".join(command[:2]),
)
def test_the_commands_for_tpu_vms_print_what_they_would_do(command):
    script, *rest = command
    at = 1 if script == "launch/tpu_vm.sh" else 0
    printed = call(script.removeprefix("launch/"), *rest[:at], "--print", *rest[at:], **TPU)
    assert printed.returncode == 0 and printed.stdout.startswith("gcloud compute tpus tpu-vm ")


def assert_main_takes(arguments: list[str]) -> None:
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    assert set(flags) <= set(main.flags.FLAGS)
    config.parse(runpy.run_path(str(ROOT / flags["config"]))["get_config"]())


def test_gkdjax_main_takes_the_arguments_of_each_command():
    found = [c[c.index("gkdjax.main") + 1 :] for c in COMMANDS if "gkdjax.main" in c]
    found += [c[c.index("launch/slurm.sbatch") + 1 :] for c in COMMANDS if c[0] == "sbatch"]
    assert len(found) >= 4
    for arguments in found:
        assert_main_takes(arguments)
