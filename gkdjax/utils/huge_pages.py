"""Large arrays of the host in pages of 2 MB, as Linux gives them to those who ask.

XLA's CPU backend asks the system for the memory of a step's intermediates anew at each step, and
the first touch of each 4 kB page costs about as much as filling it. glibc from 2.35 on asks for
large pages where its tunable says so; it reads that once, as a process begins.
"""

import os
import pathlib
import sys

TUNABLE = "glibc.malloc.hugetlb=1"
_SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def begin_again() -> None:
    """Begins this process again with large pages, unless it has them or cannot have them.

    The process keeps its id and arguments, so nothing may have been done yet. Where the user has
    set the tunable, to whatever value, and in a debugger the process goes on as it is.
    """
    given = os.environ.get("GLIBC_TUNABLES") or ""
    on_request = _SETTING.is_file() and "[madvise]" in _SETTING.read_text()
    if on_request and "hugetlb" not in given and sys.gettrace() is None and sys.executable:
        os.environ["GLIBC_TUNABLES"] = f"{given}:{TUNABLE}".removeprefix(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
