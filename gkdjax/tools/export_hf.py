"""Writes a saved step of a run as a Hugging Face model directory or a PEFT adapter directory.

    python -m gkdjax.tools.export_hf --checkpoint=RUN --out=DIR [--adapter|--merged] [--step=N]

The run may still be going on. DIR appears whole; one that is there is replaced at the very end.
"""

import argparse
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
from absl import logging

from gkdjax import config as config_lib
from gkdjax.data.chat_template import load_chat
from gkdjax.models.decoder import abstract_params
from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.hf import export, load, model_config, peft
from gkdjax.train import models, workdir
from gkdjax.train.checkpoint import read_trainable
from gkdjax.utils.errors import GkdjaxError, UserError
from gkdjax.utils.files import read_json


def export_step(
    run: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    adapter: bool = False,
    step: int | None = None,
) -> int:
    """Writes `out` -> the step that it holds.

    Args:
      run: a run's directory, with config.json and checkpoints.
      out: absent, empty, or a directory of the same kind, which is replaced.
      adapter: the adapter alone, for peft; else the whole model, an adapter merged into its base.
      step: None takes the newest checkpoint that is whole.

    Raises:
      UserError: no run, no such step, a full fine-tuning has no adapter, `out` holds something
        else, or the student's model is gone.
    """
    config = _read_config(pathlib.Path(run))
    lora = config.student.adapter == "lora"
    if adapter and not lora:
        raise UserError(
            f"{run} has trained every parameter (student.adapter = 'none'), so there is no adapter;"
            " leave --adapter out to write the whole model"
        )
    source = workdir.local_directory(config.student.model, pathlib.Path(run))
    _check_out(pathlib.Path(out), config, source, adapter)
    spec = model_config.load_spec(source)
    ending = _ending(config, source, pathlib.Path(run))
    step, trainable = read_trainable(pathlib.Path(run), _trainable_like(config, spec), step)
    if adapter:
        base = workdir.base_name(config.student.model, pathlib.Path(run))
        export.export_adapter(out, spec, trainable, source, base, ending)
    elif lora:
        params = load.load_pretrained(source, config.student.dtype)[1]
        export.export_merged(out, spec, params, trainable, source, ending=ending)
    else:
        export.export_merged(out, spec, trainable, None, source, ending=ending)
    return step


def _read_config(run: pathlib.Path) -> config_lib.Config:
    path = run / "config.json"
    try:
        saved = json.loads(path.read_text())
        if not isinstance(saved, dict):
            raise ValueError("no JSON object")
        return config_lib.parse(config_lib.from_saved(saved))
    except FileNotFoundError:
        raise UserError(f"{run} holds no config.json, so it is not a run's directory") from None
    except UserError as error:
        raise UserError(f"{path} is not a run's: {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _ending(config: config_lib.Config, source: pathlib.Path, run: pathlib.Path) -> export.Ending:
    """What the run has written down; in an older one, where its student's chat stops."""
    written = read_json(run / export.ENDING)
    if written is not None:
        return export.Ending(tuple(written["stop_ids"]), written["pad_id"])
    chat = load_chat(source, config.data.template_kwargs)
    return export.Ending(chat.stop_ids, chat.pad_id)


def _check_out(out: pathlib.Path, config: config_lib.Config, source: pathlib.Path, adapter: bool):
    """Only what this tool could have written is replaced, and never what the run stands on."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    teacher = config.teacher
    used = (teacher.model, teacher.tokenizer, teacher.adapter, config.student.lora.init_from)
    if out.resolve() in {
        source.resolve(),
        *(pathlib.Path(name).resolve() for name in used if name),
    }:
        raise UserError(f"--out={out} is what the run began with; name another directory")
    found = out / (peft.CONFIG if adapter else "config.json")
    key = "peft_type" if adapter else "model_type"
    kind = "an adapter" if adapter else "a model"
    try:
        is_kind = key in json.loads(found.read_text())
    except (OSError, ValueError):
        is_kind = False
    if not is_kind:
        raise UserError(
            f"--out={out} is there and not the directory of {kind}, which could be replaced;"
            " name another place"
        )


def _trainable_like(config: config_lib.Config, spec: DecoderConfig) -> dict:
    """`TrainState.trainable` of the run, as shapes."""
    params = abstract_params(spec, jnp.float32)
    if config.student.adapter == "none":
        return params
    key = jax.random.key(0)
    return jax.eval_shape(lambda: models.fresh_adapters(config, params, key))


def main(argv: list[str] | None = None) -> int:
    """The command -> exit code."""
    parser = argparse.ArgumentParser("export_hf", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="The run's directory.")
    parser.add_argument("--out", required=True, metavar="DIR", help="Directory to write.")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--merged", action="store_true", help="The whole model; the default.")
    kind.add_argument("--adapter", action="store_true", help="The LoRA adapter alone, for peft.")
    parser.add_argument("--step", type=int, help="Default: the newest checkpoint that is whole.")
    given = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)  # orbax has much to say at INFO
    try:
        step = export_step(given.checkpoint, given.out, adapter=given.adapter, step=given.step)
    except GkdjaxError as error:
        print(f"export_hf: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{given.out}: step {step} of {given.checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
