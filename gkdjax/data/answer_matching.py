"""Whether an answer is right, by what its question expects:

| match    | it is right if                                                               |
|----------|------------------------------------------------------------------------------|
| keywords | any of the expected stands in it, both in lower case                         |
| exact    | it is one of the expected, but for white space around it                     |
| regex    | any of the expected is found in it (`re.search`; `(?m)` for lines: `(?m)^A`) |

Thoughts are no answer: `<think>` blocks are removed first, also one that is cut off before its end,
and one that begins in the prompt, as some chat templates write it.
"""

import re

from gkdjax.types import Expected
from gkdjax.utils.errors import UserError

_BLOCK = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


def is_right(answer: str, expected: Expected) -> bool:
    answer = without_thoughts(answer).strip()
    if expected.match == "keywords":
        return any(keyword.lower() in answer.lower() for keyword in expected.any_of)
    if expected.match == "exact":
        return answer in {one.strip() for one in expected.any_of}
    return any(re.search(pattern, answer) for pattern in expected.any_of)


def without_thoughts(answer: str) -> str:
    return _BLOCK.sub("", answer).rpartition("</think>")[2]


def check_patterns(expected: Expected, where: str) -> None:
    """Raises UserError for an invalid regular expression; `where` starts the message."""
    for pattern in expected.any_of if expected.match == "regex" else ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{where}: {pattern!r} is no regular expression: {error}") from error
