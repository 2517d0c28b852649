"""The READMEs: their Python runs, CI runs their commands, their links and files are there."""

import inspect
import re

import pytest
from readme_commands import README, ROOMS, command

import gkdjax
from gkdjax import config
from gkdjax.report import run_files
from gkdjax.tools import options_table
from gkdjax.train import run

ROOT = README.parent
READMES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOMS.glob("*/*.md"))
    if not path.relative_to(ROOT).parts[0].startswith(".")
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|<!--.*?-->|`[^`]*`", re.DOTALL)
FILE = re.compile(r"`([\w/.]+\.py)`")


def blocks(readme) -> list[str]:
    return re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)


def block(readme, part: str) -> str:
    return next(b for b in blocks(readme) if part in b)


def anchors(readme) -> set[str]:
    """Those that GitHub makes of the headings."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", readme.read_text(), flags=re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_two_commands_are_there_and_ci_runs_them():
    assert "-m gkdjax.main --config=configs/quickstart.py" in command("quickstart")
    assert command("tests").endswith("-m pytest")
    ci = (ROOT / ".ci" / "run").read_text()
    assert "readme_commands.py quickstart" in ci and "readme_commands.py tests" in ci


def test_the_readme_is_one_page():
    assert len(README.read_text().splitlines()) <= 200


def test_the_losses_example_runs():
    losses = ROOMS / "losses" / "README.md"
    scope: dict = {}
    exec(block(losses, "topk_forward_kl"), scope)
    assert 0 < float(scope["jsd"]) < float(scope["loss"])
    exec(block(losses, "fused_topk_divergence"), scope)
    assert float(scope["loss"]) > 0 and scope["gradient"].shape == scope["hidden"].shape
    assert (scope["gradient"][1, 3:] == 0).all() and (scope["gradient"][1, 2] != 0).any()


def test_the_config_example_parses():
    scope: dict = {}
    exec(block(README, "def get_config"), scope)
    parsed = config.parse(scope["get_config"]())
    assert parsed.teacher.backend == "local-toggle" and len(parsed.data.train) == 2


@pytest.mark.parametrize(
    "readme", [README, ROOMS / "teachers" / "README.md"], ids=["top", "teachers"]
)
def test_the_library_entry_is_spelt_as_it_is(readme, monkeypatch):
    signature, calls = inspect.signature(run.run), []
    monkeypatch.setattr(run, "run", lambda *a, **k: calls.append(signature.bind(*a, **k).arguments))
    scope = {"my_teacher": object()}
    exec(block(README, "def get_config"), scope)
    exec(block(readme, "gkdjax.run("), scope)
    (call,) = calls
    assert call["teacher"] is scope["my_teacher"] and call["workdir"] == "runs/french"
    assert config.parse(call["config"]).student.model == "models/student"
    assert gkdjax.run is run.run


def test_the_options_are_those_of_the_schema_and_each_says_what_it_is():
    readme = options_table.README.read_text()
    assert options_table.updated(readme) == readme, "python -m gkdjax.tools.options_table --write"
    rows = re.findall(r"^\| `([\w.]+)` \| `(.+)` \| (.*) \| (.*) \|$", options_table.table(), re.M)
    assert all(values and comment for _, _, values, comment in rows)
    keys = run_files.flat(config.to_dict(config.Config()))
    assert sorted(key for key, *_ in rows) == sorted(keys)
    assert ("gkd.reduction", '"token"', '"token" or "example"') in [row[:3] for row in rows]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files_are_there(readme):
    text = readme.read_text()
    for target in LINK.findall(CODE.sub("", text)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (readme.parent / path).resolve() if path else readme
        assert file.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(file), f"{target} has no such heading"
    if ROOMS in readme.parents:
        known = {path.name for path in ROOT.rglob("*.py")}
        for name in FILE.findall(text):
            places = [ROOT / name, ROOMS / name, readme.parent / name]
            there = any(place.is_file() for place in places) or ("/" not in name and name in known)
            assert there, f"{name} is no file"
