"""Prints one of the README's two set-up commands, so that CI runs what a newcomer reads.

A command is the indented block that follows a line "<!-- command: NAME -->".
"""

import pathlib
import sys

README = pathlib.Path(__file__).parents[1] / "README.md"


def command(name: str) -> str:
    """The text of the command, without its indentation."""
    after = README.read_text().split(f"<!-- command: {name} -->\n", 1)[1]
    lines = []
    for line in after.lstrip("\n").splitlines():
        if not line.startswith("    "):
            break
        lines.append(line[4:])
    if not lines:
        raise ValueError(f"README.md has no indented command after {name!r}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(command(sys.argv[1]))
