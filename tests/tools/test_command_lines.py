"""Every tool runs with `python -m`: a process each, as nothing else tries its last two lines."""

import os
import pathlib
import subprocess
import sys

import pytest

from gkdjax import tools
from gkdjax.config import ASSETS
from gkdjax.tools import compare, export_hf, import_hf

ROOT = pathlib.Path(__file__).parents[2]
QUICKSTART = "--config=configs/quickstart.py"
CALLS = [
    (
        "cache_teacher",
        [QUICKSTART],
        2,
        "gkdjax: config.teacher.backend = 'flax', .offline = False: ",
    ),
    ("check_teacher", [QUICKSTART], 2, "'flax' is in this process"),
    ("compare", ["TMP"], 2, "compare: TMP holds no config.json"),
    ("export_hf", ["--checkpoint=TMP", "--out=TMP/out"], 2, "export_hf: TMP holds no config.json"),
    ("import_hf", [f"--check={ASSETS}/quickstart/student"], 0, "family              gemma3 ("),
    ("make_quickstart", ["--out=TMP"], 2, "make_quickstart: --out=TMP is not empty"),
    ("make_tiny", ["--out=TMP/tiny", "--width=8"], 2, "make_tiny: width = 8: must be at least 16"),
    ("options_table", [], 0, "| `train.seed` | `0` |"),
    ("plan_memory", [QUICKSTART, "--chips=8xcpu", "--config.mesh.fsdp=3"], 2, "a multiple of 3"),
    ("replay_batch", ["TMP", "--step=1"], 2, "replay_batch: TMP"),
    ("report", ["TMP"], 2, "report: TMP holds no config.json"),
    ("store_info", ["TMP/none"], 2, "store_info: TMP/none (config.teacher.store): there is no"),
]


def test_every_tool_is_called():
    folder = pathlib.Path(tools.__file__).parent
    names = {path.stem for path in folder.iterdir() if not path.name.startswith("__")}
    assert names - {"tiny_mode"} == {name for name, *_ in CALLS}  # that one is a library


@pytest.mark.parametrize(("tool", "arguments", "code", "text"), CALLS, ids=[c[0] for c in CALLS])
def test_a_tool_ends_with_its_code_and_no_traceback(tmp_path, tool, arguments, code, text):
    (tmp_path / "mine.txt").write_text("mine")
    arguments = [argument.replace("TMP", str(tmp_path)) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", f"gkdjax.tools.{tool}", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert done.returncode == code, done.stderr
    assert text.replace("TMP", str(tmp_path)) in (done.stderr if code else done.stdout)
    assert "Traceback" not in done.stderr and (code or not done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("main", "arguments", "text"),
    [
        (import_hf.main, ["--chek=x"], "--check"),
        (export_hf.main, ["--checkpoint=a", "--out=b", "--adapter", "--merged"], "not allowed"),
        (compare.main, [], "required: RUN"),
    ],
)
def test_a_wrong_flag_is_named(main, arguments, text, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err
