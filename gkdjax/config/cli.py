"""The command line of every program that takes a config: flags, logging, and exit codes."""

import gc
import logging as std_logging
import os
import pathlib
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from gkdjax.config import schema
from gkdjax.config.parse import RENAMED, check_key, parse
from gkdjax.utils.errors import GkdjaxError, Interrupted, Preempted, UserError
from gkdjax.utils.files import print_or_drop

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file with get_config().")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives, also gs://BUCKET/RUN; default runs/CONFIG'S NAME."
)


def run(main: Callable[[schema.Config, str], None]) -> None:
    """Calls `main(config, workdir)`; an expected error is one line on stderr and an exit code.

    A signal that would end the process is a request to stop from here on, see `train.stopping`.
    """
    print_or_drop()
    logging.get_absl_handler().python_handler.setStream(sys.stderr)  # it has the old one
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)  # one that is ignored stays so, as nohup wants it

    def with_config(argv: list[str]) -> None:
        del argv
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.INFO)
            logging.get_absl_handler().addFilter(_is_for_people)
        # transformers is used for tokenizers and config files: it needs no torch for them.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        parsed = parse(_CONFIG.value)
        main(parsed, _WORKDIR.value or str(_default_workdir()))

    try:
        app.run(with_config, flags_parser=_parse_flags)
    except GkdjaxError as error:
        print(f"gkdjax: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # a run has its own answer, see train.stopping
        sys.exit(130)


def _stop(number: int, frame) -> None:
    """Ends the process where it is, past all that handles errors."""
    callbacks = {getattr(each, "__code__", None) for each in gc.callbacks}
    if any(each.f_code in callbacks for each, _ in traceback.walk_stack(frame)):
        # Whatever is raised within one of them is lost; jax has one.
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        return
    print(f"gkdjax: stopped by {signal.Signals(number).name}; run again", file=sys.stderr)
    sys.exit((Interrupted if number == signal.SIGINT else Preempted).exit_code)


def _is_for_people(record) -> bool:
    """Messages of this package, and warnings of others: orbax and jax log much at INFO.

    Errors of others that end a run are raised, so nobody needs their tracebacks in the log as well.
    """
    ours = pathlib.Path(__file__).parents[1] in pathlib.Path(record.pathname).parents
    if not ours:
        record.exc_info = record.exc_text = None
    return ours or record.levelno > std_logging.INFO


def _default_workdir() -> pathlib.Path:
    """runs/gemma3 for configs/gemma3.py, runs/gemma3-tiny for configs/gemma3.py:tiny."""
    path, _, mode = flags.FLAGS["config"].config_filename.partition(":")
    stem = pathlib.Path(path).stem
    return pathlib.Path("runs") / (f"{stem}-{mode}" if mode else stem)


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing; mistakes in the config become UserError."""
    for argument in argv:
        if argument.startswith("--config."):
            check_key(argument.removeprefix("--config.").partition("=")[0])
    try:
        rest = flags.FLAGS(argv)
        if not _CONFIG.present:
            raise UserError("name a config file: --config=configs/quickstart.py")
        _CONFIG.value.to_dict()  # a file that could not be read says so only when it is used
    except flags.Error as error:  # an error of the file's get_config(ARGUMENT) has its traceback
        head, found, rest = str(error).partition("Traceback (most recent call last)")
        message = f"{head.strip().rstrip(':')}: {rest.strip().splitlines()[-1]}" if found else head
        raise UserError(message) from error
    except OSError as error:  # the last line of the chain has the file's name
        last = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"the config file cannot be read: {last}") from error
    except GkdjaxError:
        raise
    except Exception as error:  # the config file is the user's program and may raise anything
        raise UserError(f"{_where(error, argv)}: {_readable(error)}") from error
    return rest


def _readable(error: Exception) -> str:
    """An unknown key without the dump of its section, anything else with its type."""
    unknown = re.search(r'Key "(\w+)" does not exist', str(error))
    if unknown is None and isinstance(error, AttributeError):  # it may say no more than the name
        unknown = re.fullmatch(r"""["']*(\w+)["']*""", str(error))
    if unknown is None:
        return f"{type(error).__name__}: {error}"
    for old, new in RENAMED.items():
        if old.rpartition(".")[2] == unknown[1]:
            return f"unknown key {unknown[1]!r}: config.{old} is now called config.{new}"
    near = re.search(r'Did you mean "(\w+)"', str(error))
    return f"unknown key {unknown[1]!r}" + (f": did you mean {near[1]!r}?" if near else "")


def _where(error: Exception, argv: list[str]) -> str:
    """The last frame of the error in the config file, as "configs/x.py, line 12"."""
    named = [a.partition("=")[2].partition(":")[0] for a in argv if a.startswith("--config=")]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for path in named:
            if pathlib.Path(frame.filename).absolute() == pathlib.Path(path).absolute():
                return f"{path}, line {frame.lineno}"
    return ", ".join(named)
