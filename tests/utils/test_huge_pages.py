"""Large pages, in processes of their own: the tunable is read as a process begins."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """\
import json, os, pathlib, sys
from gkdjax.utils import huge_pages

print("begun")
sys.stdout.flush()
huge_pages._SETTING = pathlib.Path(sys.argv[1])
huge_pages.begin_again()
filled = bytearray(b"1") * 2**26
lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
(kb,) = [int(line.split()[1]) for line in lines if line.startswith("AnonHugePages")]
found = os.getpid(), sys.argv[2:], os.environ.get("GLIBC_TUNABLES"), kb
print(json.dumps(found))
"""
OTHER = "glibc.malloc.perturb=0"


@pytest.mark.parametrize(
    ("setting", "given", "expected", "begun"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1", 2),
        ("always [madvise] never", OTHER, f"{OTHER}:glibc.malloc.hugetlb=1", 2),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0", 1),
        ("[always] madvise never", None, None, 1),
        ("always madvise [never]", None, None, 1),
        (None, None, None, 1),
    ],
)
def test_a_process_begins_again_once_where_that_gives_it_large_pages(
    setting, given, expected, begun, tmp_path
):
    file = tmp_path / "enabled"
    if setting is not None:
        file.write_text(setting)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("GLIBC_TUNABLES", None)
    if given is not None:
        env["GLIBC_TUNABLES"] = given
    arguments = ["an argument", "--flag="]
    command = [sys.executable, "-c", SCRIPT, str(file), *arguments]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    *lines, found = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0 and lines == ["begun"] * begun
    pid, read, tunables, kb = json.loads(found)
    assert (pid, read, tunables) == (process.pid, arguments, expected)
    real = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if begun == 2 and real.is_file() and "[madvise]" in real.read_text():
        assert kb >= 2**15  # half of what was filled


COMMAND = """\
import os, pathlib, runpy, sys
from gkdjax.utils import huge_pages

huge_pages._SETTING = pathlib.Path(sys.argv[1])
os.execv = lambda path, arguments: sys.exit(f"begins again as {path}")
runpy.run_module("gkdjax.main", run_name="__main__")
"""


def test_the_command_begins_again(tmp_path):
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": ""}
    command = [sys.executable, "-c", COMMAND, str(file)]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert process.stderr.strip() == f"begins again as {sys.executable}"
