"""Flags of `python -m gkdjax.tools.make_quickstart`."""

import sys

from absl import app, flags

from gkdjax.tools.make_quickstart import build
from gkdjax.utils.errors import UserError

_OUT = flags.DEFINE_string("out", None, "Directory to write; must be empty or absent.")
_SEED = flags.DEFINE_integer("seed", build.SEED, "Of the key, the data and the two models.")
_TINY = flags.DEFINE_bool("tiny", False, "A few steps and rows: tries the plumbing, no more.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if _OUT.value is None:
        raise app.UsageError("--out=DIR is needed")
    try:
        build.make(_OUT.value, _SEED.value, build.TINY if _TINY.value else build.FULL)
    except UserError as error:
        print(f"make_quickstart: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    app.run(main)
