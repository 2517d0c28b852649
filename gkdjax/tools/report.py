"""Draws a run's report.png and report.html anew, also while the run goes on.

    python -m gkdjax.tools.report RUN [--out=FILE.html]

The page of an unfinished run lacks the later measures, and says so.
"""

import argparse
import pathlib
import sys

from gkdjax import report, tools
from gkdjax.report import run_files
from gkdjax.utils.errors import UserError


def write(run: pathlib.Path, out: pathlib.Path | None) -> None:
    """Writes the page `out` (default: RUN/report.html) and the picture beside it; prints both.

    Raises:
      UserError: `run` is no run's directory, or `out` cannot be written.
    """
    out = out or run / "report.html"
    if out.suffix != ".html":
        raise UserError(f"--out={out} names no page: let it end in .html")
    written = [report.write_html(run, out), report.draw(run, out.with_suffix(".png"))]
    files = run_files.read(run)
    print(f"{run}: {files.state}", *files.damaged, *written, sep="\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("report", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, metavar="RUN", help="A run's directory.")
    text = "Default: RUN/report.html. The picture lies beside it, with .png."
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE.html", help=text)
    return tools.run(parser, lambda flags: write(flags.run, flags.out), argv)


if __name__ == "__main__":
    sys.exit(main())
