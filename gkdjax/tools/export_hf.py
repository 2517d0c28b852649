"""Writes a saved step of a run as a Hugging Face model directory or a PEFT adapter directory.

    python -m gkdjax.tools.export_hf --checkpoint=RUN --out=DIR [--adapter|--merged] [--step=N]

The run may still be going on, unless DIR lies in it. DIR appears whole; an older one is replaced at
the very end.
"""

import argparse
import contextlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
from absl import logging

from gkdjax import config as config_lib
from gkdjax import tools
from gkdjax.data.chat_template import load_chat
from gkdjax.models.decoder import abstract_params
from gkdjax.models.hf import export, load, model_config, peft
from gkdjax.report.run_files import load as load_file
from gkdjax.train import lock, models, workdir
from gkdjax.train.checkpoint import read_trainable
from gkdjax.utils.errors import UserError


def export_step(
    run: pathlib.Path, out: pathlib.Path, *, adapter: bool = False, step: int | None = None
) -> int:
    """Writes the model, or the adapter alone, of a run's `step` into `out` -> the step.

    `out` is absent, empty, or a directory of the same kind, which is replaced. None takes the
    newest checkpoint that is whole.

    Raises:
      UserError: no run, no such step, a full fine-tuning has no adapter, `out` holds something
        else, or the student's model is gone.
    """
    config = workdir.saved_config(run)
    lora = config.student.adapter == "lora"
    if adapter and not lora:
        raise UserError(
            f"{run} has trained every parameter (student.adapter = 'none'), so there is no adapter;"
            " leave --adapter out to write the whole model"
        )
    source = workdir.local_directory(config.student.model, run)
    _check_out(out, run, adapter)
    spec = model_config.load_spec(source)
    ending = _ending(config, source, run)
    like = abstract_params(spec, jnp.float32)
    if lora:
        key, params = jax.random.key(0), like
        like = jax.eval_shape(lambda: models.fresh_adapters(config, params, key))
    step, trainable = read_trainable(run, like, step)
    if adapter:
        base = workdir.base_name(config.student.model, run)
        export.export_adapter(out, spec, trainable, source, base, ending)
    elif lora:
        params = load.load_pretrained(source, config.student.dtype)[1]
        export.export_merged(out, spec, params, trainable, source, ending=ending)
    else:
        export.export_merged(out, spec, trainable, None, source, ending=ending)
    return step


def _ending(config: config_lib.Config, source: pathlib.Path, run: pathlib.Path) -> export.Ending:
    """The run's file; in an older run, the end of its student's chat template."""
    written = load_file(run / export.ENDING)
    if written is not None:
        return export.Ending(tuple(written["stop_ids"]), written["pad_id"])
    chat = load_chat(source, config.data.template_kwargs)
    return export.Ending(chat.stop_ids, chat.pad_id)


def _check_out(out: pathlib.Path, run: pathlib.Path, adapter: bool) -> None:
    """Replaces only a directory that this tool could have written, and none that the run reads."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if out.resolve() in {place.resolve() for place in workdir.begun_with(run)}:
        raise UserError(f"--out={out} is what the run began with; name another directory")
    if adapter:
        kind, file, key = "an adapter", peft.CONFIG, "peft_type"
    else:
        kind, file, key = "a model", "config.json", "model_type"
    try:
        is_kind = key in json.loads((out / file).read_text())
    except (OSError, ValueError):
        is_kind = False
    if not is_kind:
        raise UserError(
            f"--out={out} is there and not the directory of {kind}, which could be replaced;"
            " name another place"
        )


def _export(flags: argparse.Namespace) -> None:
    logging.set_verbosity(logging.WARNING)  # orbax has much to say at INFO
    run, out = flags.checkpoint, flags.out
    inside = out.resolve().is_relative_to(run.resolve())
    with lock.locked(run) if inside and run.is_dir() else contextlib.nullcontext():
        step = export_step(run, out, adapter=flags.adapter, step=flags.step)
    print(f"{out}: step {step} of {run}")


def main(argv: list[str] | None = None) -> int:
    path = pathlib.Path
    parser = argparse.ArgumentParser("export_hf", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=path, required=True, metavar="RUN", help="A run.")
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="To write.")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--merged", action="store_true", help="The whole model; the default.")
    kind.add_argument("--adapter", action="store_true", help="The LoRA adapter alone, for peft.")
    parser.add_argument("--step", type=int, help="Default: the newest checkpoint that is whole.")
    return tools.run(parser, _export, argv)


if __name__ == "__main__":
    sys.exit(main())
