"""Whether an answer is right, by what its question expects:

| match    | it is right if                                                               |
|----------|------------------------------------------------------------------------------|
| keywords | any of the expected stands in it, both in lower case                         |
| exact    | it is one of the expected, but for white space around it                     |
| regex    | any of the expected is found in it (`re.search`; `(?m)` for lines: `(?m)^A`) |

Thoughts are no answer. A `<think>` block is taken out before anything is looked for, also one that
was cut off before its end, and one whose beginning stands in the prompt (some chat templates write
it there), so that nothing but `</think>` is left of it.
"""

import re

from gkdjax.types import Expected
from gkdjax.utils.errors import UserError

_BLOCK = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


def is_right(answer: str, expected: Expected) -> bool:
    """Whether the text of an answer is one that is expected."""
    said = without_thoughts(answer).strip()
    if expected.match == "keywords":
        said = said.lower()
        return any(keyword.lower() in said for keyword in expected.any_of)
    if expected.match == "exact":
        return said in {one.strip() for one in expected.any_of}
    return any(re.search(pattern, said) for pattern in expected.any_of)


def without_thoughts(answer: str) -> str:
    """The text that is meant for the one who asked."""
    return _BLOCK.sub("", answer).rpartition("</think>")[2]


def check_patterns(expected: Expected, where: str) -> None:
    """Raises UserError for what is no regular expression; `where` starts the message."""
    if expected.match != "regex":
        return
    for pattern in expected.any_of:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{where}: {pattern!r} is no regular expression: {error}") from error
