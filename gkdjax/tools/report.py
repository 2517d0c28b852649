"""Draws a run's report.png and report.html anew, also of a run that is still going on.

    python -m gkdjax.tools.report RUN [--out=FILE.html]

What an unfinished run has not measured yet is missing, and the page says so.
"""

import argparse
import pathlib
import sys

from gkdjax import report
from gkdjax.report import run_files
from gkdjax.utils.errors import GkdjaxError, UserError


def write(run: pathlib.Path, out: pathlib.Path | None = None) -> list[pathlib.Path]:
    """Writes the page and the picture -> their paths.

    Args:
      run: a run's directory.
      out: of the page, which ends in .html; the picture lies beside it, with .png. None means into
        `run`.

    Raises:
      UserError: `run` is no run's directory, or `out` cannot be written.
    """
    out = out or run / "report.html"
    if out.suffix != ".html":
        raise UserError(f"--out={out} names no page: let it end in .html")
    try:
        return [report.write_html(run, out), report.draw(run, out.with_suffix(".png"))]
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error


def main(argv: list[str] | None = None) -> int:
    """The command -> exit code."""
    parser = argparse.ArgumentParser("report", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, metavar="RUN", help="A run's directory.")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="FILE.html",
        help="Default: RUN/report.html. The picture lies beside it, with .png.",
    )
    given = parser.parse_args(argv)
    try:
        written = write(given.run, given.out)
        run = run_files.read(given.run)
    except GkdjaxError as error:
        print(f"report: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{given.run}: {run.state}")
    for told in run.damaged:
        print(told)
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
