"""Command lines beside `gkdjax.main`."""

import argparse
import sys
from collections.abc import Callable, Sequence

from gkdjax.utils.errors import GkdjaxError
from gkdjax.utils.files import print_or_drop


def run(
    parser: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None,
) -> int:
    """Calls `main(flags)` -> exit code; an expected error is one line on stderr."""
    print_or_drop()
    flags = parser.parse_args(argv)
    try:
        main(flags)
    except GkdjaxError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    return 0
