"""Disks that take no more."""

import contextlib
import resource


@contextlib.contextmanager
def longest_file(size: int):
    """Has the operating system refuse what is past so many bytes of any file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
