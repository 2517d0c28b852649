"""Prints one of the README's two set-up commands, so that CI runs what a newcomer reads.

A command is the indented block that follows a line "<!-- command: NAME -->".
"""

import pathlib
import sys

README = pathlib.Path(__file__).parents[1] / "README.md"
ROOMS = README.parent / "gkdjax"  # each has the manual of its subject in its README.md


def command(name: str, readme: pathlib.Path = README) -> str:
    """The text of the command, without its indentation."""
    after = readme.read_text().split(f"<!-- command: {name} -->\n", 1)[1]
    lines = []
    for line in after.lstrip("\n").splitlines():
        if not line.startswith("    "):
            break
        lines.append(line[4:])
    if not lines:
        raise ValueError(f"{readme} has no indented command after {name!r}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(command(sys.argv[1]))
