"""The ":tiny" mode of a config: the same job on random models, which are made on the spot.

    def get_config(mode: str = ""):
        tiny = tiny_mode.is_asked(mode, __file__)
        ...
        if tiny:
            tiny_mode.shrink(c)
        return c

This module imports no jax, so that a config file can call it before jax may be loaded.
"""

import json
import pathlib
import sys
import tempfile

from gkdjax.config import Teacher
from gkdjax.utils import files

MODELS = pathlib.Path("runs/tiny_models")

# Key -> number of rows to keep. A token is about a character: fewer rows are short enough.
_ROWS = {
    "data.train": 24,
    "data.validation": 8,
    "anchor.data": 8,
    "eval.questions": 8,
    "eval.heldout": 4,
    "eval.prompts": 8,
    "eval.retention": 4,
    "eval.side_effects": 4,
}


def is_asked(mode: str, file: str) -> bool:
    """Tells whether the MODE of --config=FILE:MODE is "tiny"; ValueError for an unknown one."""
    name = f"configs/{pathlib.Path(file).name}"
    if mode not in ("", "tiny"):
        raise ValueError(f"mode {mode!r}: write {name}, or {name}:tiny")
    return mode == "tiny"


def shrink(c, *, vocab_size: int = 512, steps: int = 16, learning_rate: float = 5e-3) -> None:
    """Changes a config to random models in `runs/tiny_models` and less of everything.

    All data of `c` are rows or .jsonl files. An evaluation is in the middle of the `steps`, and a
    warm-up lasts till there. Configs of these sizes share most of their compiled programs.
    """
    c.student.model = _model("student", vocab_size, width=64, layers=2, seed=2)
    if Teacher(backend=c.teacher.backend).is_model:
        c.teacher.model = _model("teacher", vocab_size, width=96, layers=3, seed=1)
    c.student.compute_dtype = "float32"
    c.student.lora.alpha *= 8 / c.student.lora.rank
    c.student.lora.rank = 8
    for key, count in _ROWS.items():
        section, name = key.split(".")
        c[section][name] = first_rows(c[section][name], count)
    c.data.max_length = 512
    c.data.bucket_lengths = (16, 256, 512)
    c.rollout.per_prompt = 1
    c.rollout.max_new_tokens = c.eval.max_new_tokens = 12
    c.gkd.on_policy_warmup_steps = min(c.gkd.on_policy_warmup_steps, steps // 2)
    c.optim.learning_rate = learning_rate
    c.train.epochs = None
    c.train.steps = steps
    c.train.batch_size = c.anchor.batch_size = c.eval.batch_size = 8
    c.train.grad_accum_steps = min(c.train.grad_accum_steps, 2)
    c.eval.every_steps = steps // 2
    c.eval.at_steps = ()


def first_rows(source, count: int):
    """The first `count` rows of a .jsonl file, of rows, or of each source in a dict; None stays."""
    if isinstance(source, list | tuple):
        return source[:count]
    if isinstance(source, str):
        lines = pathlib.Path(source).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines[:count]]
    if hasattr(source, "items"):
        return {name: first_rows(rows, count) for name, rows in source.items()}
    return source


def split_rows(path: str, count: int) -> tuple[list[dict], list[dict]]:
    """The first `count` rows of a .jsonl file, and the others."""
    rows = first_rows(path, sys.maxsize)
    return rows[:count], rows[count:]


def first_lines(path: str, count: int) -> str:
    """Writes the first `count` lines of a file beside the tiny models -> where."""
    source = pathlib.Path(path)
    short = MODELS / f"{source.parent.name}-{source.name}"
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    with files.writing(short):
        MODELS.mkdir(parents=True, exist_ok=True)
        # A place of its own: several processes may come here at the same time.
        with tempfile.TemporaryDirectory(dir=MODELS) as own:
            part = pathlib.Path(own, short.name)
            files.write_text(part, "".join(lines[:count]))
            part.replace(short)
    return str(short)


def _model(who: str, vocab_size: int, **settings: int) -> str:
    from gkdjax.tools.make_tiny import make_tiny  # slow to import

    directory = MODELS / f"{who}-{vocab_size}"
    make_tiny(directory, vocab_size=vocab_size, **settings)
    return str(directory)
