"""The two server configs: both modes of each are checked here; a real server runs the tiny ones."""

import pathlib
import runpy

import pytest

from gkdjax import config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def get_config(name: str, mode: str):
    return config.parse(runpy.run_path(str(CONFIGS / name))["get_config"](mode))


@pytest.mark.parametrize("mode", ["", "tiny"])
def test_the_vllm_mode_learns_on_policy_too(mode, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parsed = get_config("vllm_teacher.py", mode)
    assert (parsed.teacher.backend, parsed.teacher.top_k) == ("vllm", 20)
    assert parsed.gkd.on_policy_fraction > 0
    assert parsed.context.prefix_messages
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["", "tiny"])
def test_the_openai_mode_asks_for_nothing_but_the_teachers_own_text(mode, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parsed = get_config("openai_teacher.py", mode)
    assert parsed.teacher.backend == "openai"
    assert parsed.gkd.on_policy_fraction == 0
    assert parsed.anchor.reference == "base"
    assert bool(parsed.teacher.api_key_env) == (mode == "")


@pytest.mark.parametrize("name", ["vllm_teacher.py", "openai_teacher.py"])
def test_an_unknown_mode_is_told_which_there_are(name):
    with pytest.raises(ValueError, match=rf"mode 'tny'.*{name}"):
        get_config(name, "tny")
