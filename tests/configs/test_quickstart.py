"""The embedded default. CI runs it whole; here are its parts."""

import copy
import importlib.util
import pathlib

import pytest
from check_quickstart import shortfalls

from gkdjax import config

ROOT = pathlib.Path(__file__).parents[2]
GOOD = {
    "base": {"accuracy": 0.0, "forward_kl": 5.0},
    "student": {"accuracy": 0.99, "forward_kl": 0.01},
    "recovery": 0.99,
    "retention": {
        "sort": {"before": 0.99, "after": 0.97},
        "other keys": {"before": 0.8, "after": 0.9},
    },
}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_parses_and_names_its_command(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a config must not depend on where it is run
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    config.parse(module.get_config())
    assert f"python -m gkdjax.main --config=configs/{path.name}" in module.__doc__


def test_the_aim_is_met_by_good_results_alone():
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
