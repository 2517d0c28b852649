"""The code with which a process of several leaves; whole ends: tests/launch/test_cluster.py."""

import pytest

from gkdjax.parallel.shutdown import exit_code
from gkdjax.utils.errors import Preempted, UserError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SystemExit(None), 0),
        (SystemExit(3), 3),
        (SystemExit("a message, which Python prints"), 1),
        (ValueError("any other"), 1),
        (UserError("the user's"), 2),
        (Preempted("stopped"), 75),
    ],
)
def test_a_process_leaves_with_pythons_code_or_the_errors_own(error, code):
    assert exit_code(error) == code
