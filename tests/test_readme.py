"""The README's Python runs, its commands are the ones CI runs, and its table knows every key."""

import dataclasses
import pathlib
import re
import typing

from readme_commands import README, command

from gkdjax import config

TEXT = README.read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_two_commands_are_there_and_ci_runs_them():
    assert "-m gkdjax.main --config=configs/quickstart.py" in command("quickstart")
    assert command("tests").endswith("-m pytest")
    ci = (pathlib.Path(README).parent / ".ci" / "run").read_text()
    assert "readme_commands.py quickstart" in ci and "readme_commands.py tests" in ci


def test_the_losses_example_runs():
    block = next(b for b in BLOCKS if "topk_forward_kl" in b)
    scope: dict = {}
    exec(block, scope)
    assert 0 < float(scope["jsd"]) < float(scope["loss"])
    exec(next(b for b in BLOCKS if "fused_topk_divergence" in b), scope)
    assert float(scope["loss"]) > 0 and scope["gradient"].shape == scope["hidden"].shape
    assert (scope["gradient"][1, 3:] == 0).all() and (scope["gradient"][1, 2] != 0).any()


def test_the_config_example_parses():
    block = next(b for b in BLOCKS if "def get_config" in b)
    scope: dict = {}
    exec(block, scope)
    parsed = config.parse(scope["get_config"]())
    assert parsed.teacher.backend == "local-toggle" and len(parsed.data.train) == 2


def test_the_library_entry_is_spelt_as_it_is():
    block = next(b for b in BLOCKS if "loop.run" in b)
    call = re.search(r"loop\.run\(get_config\(\), workdir=\"[^\"]+\", teacher=my_teacher\)", block)
    assert call is not None


def test_every_key_of_the_config_stands_in_the_table():
    table = TEXT.split("### The config")[1].split("### Did it work?")[0]
    for section, cls in typing.get_type_hints(config.Config).items():
        for field in dataclasses.fields(cls):
            name = "student.lora" if (section, field.name) == ("student", "lora") else field.name
            assert re.search(rf"`{section}\.|`{name}", table), f"{section} is missing"
            assert name in table, f"{section}.{field.name} is missing in the README's table"
