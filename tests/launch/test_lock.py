"""launch/lock.txt has an exact version, with hashes, of all that setup.py asks for."""

import ast
import pathlib

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[2]
NOT_LOCKED = {"peft", "torch"}  # for some tests alone; torch has other files for each accelerator


def asked_for() -> tuple[list[Requirement], list[Requirement]]:
    """(of the package itself, of its development)."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (dev,) = (n.value for n in tree.body if isinstance(n, ast.Assign))
    (call,) = (
        n.value for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)
    )
    (needs,) = (k.value for k in call.keywords if k.arg == "install_requires")
    return tuple([*map(Requirement, ast.literal_eval(node))] for node in (needs, dev))


def locked(python: str) -> dict[str, str]:
    """Name -> version under that Python on Linux."""
    text = (ROOT / "launch/lock.txt").read_text().replace("\\\n", " ")
    environment = default_environment() | {"python_version": python}
    environment |= {"python_full_version": f"{python}.0", "sys_platform": "linux"}
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        requirement, *hashes = line.split("--hash=sha256:")
        requirement = Requirement(requirement)
        assert hashes and all(len(one.strip()) == 64 for one in hashes), line
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (version,) = requirement.specifier
            assert version.operator == "=="
            assert found.setdefault(canonicalize_name(requirement.name), version.version)
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_each_requirement_has_one_version_in_its_range(python):
    versions = locked(python)
    needs, dev = asked_for()
    for requirement in (*needs, *dev):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
    assert not NOT_LOCKED & versions.keys()
    assert "jaxlib" in versions and len(versions) > 60
