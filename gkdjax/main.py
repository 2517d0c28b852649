"""python -m gkdjax.main --config=configs/quickstart.py [--workdir=DIR] [--config.a.b=value]"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from gkdjax import config
from gkdjax.errors import GkdjaxError, UserError

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file with get_config().")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives; default runs/<config's name>."
)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING if logging.get_verbosity() == 0 else logging.INFO)
    parsed = config.parse(_CONFIG.value)
    from gkdjax import loop  # jax and the models: only once the config is known to be right

    loop.run(parsed, _WORKDIR.value or _default_workdir())


def _default_workdir() -> pathlib.Path:
    """runs/gemma3 for configs/gemma3.py, runs/gemma3-tiny for configs/gemma3.py:tiny."""
    path, _, mode = flags.FLAGS["config"].config_filename.partition(":")
    stem = pathlib.Path(path).stem
    return pathlib.Path("runs") / (f"{stem}-{mode}" if mode else stem)


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, with mistakes in the config told as ours."""
    try:
        for argument in argv:
            if argument.startswith("--config."):
                config.check_key(argument.removeprefix("--config.").partition("=")[0])
        rest = flags.FLAGS(argv)
        if not _CONFIG.present:
            raise UserError("name a config file: --config=configs/quickstart.py")
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(str(error)) from error


def run() -> None:
    """Runs `main`; an expected error becomes one line on stderr and its exit code."""
    try:
        app.run(main, flags_parser=_parse_flags)
    except GkdjaxError as error:
        print(f"gkdjax: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run()
